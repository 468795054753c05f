"""TrainingSettings: every choice of the training loop, declared once."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class TrainingSettings:
    """How a tuning is trained; None means the method's own default.

    `batch_size` rows make an optimizer step; `micro_batch_tokens` limits memory only. `warmup` is a share
    of all steps. Validation runs every `validate_every` steps (None: each epoch); `early_stopping` ends
    training after that many validations without a better loss; the best weights are kept. A checkpoint is
    written every `checkpoint_every` steps and when a signal asks to stop.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 8
    micro_batch_tokens: int = 1024
    learning_rate: float | None = None
    weight_decay: float | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.06
    clip: float = 1.0
    validate_every: int | None = None
    early_stopping: int | None = None
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "micro_batch_tokens", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        for key in ("max_steps", "validate_every", "early_stopping"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; it is a share of the steps, at least 0 and below 1")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if self.clip <= 0:
            raise ValueError(f"clip is {self.clip}; it must be above 0")

    def steps(self, rows: int) -> int:
        """Optimizer steps for a training split of `rows` rows."""
        per_epoch = -(-rows // self.batch_size)
        return self.max_steps or self.epochs * per_epoch

    def rate(self, step: int, steps: int, peak: float) -> float:
        """Learning rate of step `step` (from 0): warm-up to `peak`, then decay towards 0."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return peak * (step + 1) / warm
        done = (step - warm) / max(1, steps - warm)
        if self.schedule == "constant":
            return peak
        if self.schedule == "cosine":
            return peak * (1 + math.cos(math.pi * done)) / 2
        return peak * (1 - done)
