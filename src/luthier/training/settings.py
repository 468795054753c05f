"""TrainingSettings: every choice of the training loop, declared once."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from luthier.training.optimizer import Kind

# Micro-batches of this many tokens keep a few cores busy, and of this many an accelerator, whose launches they share.
CPU_TOKENS, ACCELERATOR_TOKENS = 2048, 8192
# On a CPU as many thousands more, to so many, as keep no more than those do in a model of this many blocks times width.
MOST_CPU_TOKENS, STATES = 4096, 30 * 576


@dataclass(frozen=True)
class TrainingSettings:
    """How a tuning is trained; None means the method's own default.

    `batch_size` rows make an optimizer step; `micro_batch_tokens` limits memory only (None: what the device is quick
    with). `warmup` is a share of all steps. `rates` multiply the rate of parameters by shell pattern, `layer_decay` that of each block below the
    last once more, `lora_plus` that of LoRA's B. `label_smoothing` gives that share of the target to all tokens; `neftune`
    is the noise on the embeddings of training rows. Validation runs every `validate_every` steps (None: each
    epoch); `early_stopping` ends training after that many validations without a better `watch` (loss, accuracy, or one
    of the metrics, for which answers are generated); the best weights are kept. `gradient_checkpointing` computes each
    block, or a share of them from the first on, again instead of keeping its inside; `halve_out_of_memory` halves `micro_batch_tokens` where a step does not fit. `frozen_cache` keeps on disk what the blocks below a
    tuning (or an untouched encoder) make of the training rows, and trains from there.
    `shard` divides weights, gradients and optimizer over the processes that were started, instead of the rows alone.
    `snapshots` keeps the weights at that many even places before the end and scores each: the forgetting at one score.
    A checkpoint is written every `checkpoint_every` steps and when a signal asks to stop. `hooks` are functions of
    the user's own, told each step's and validation's numbers. `trackers` are
    accelerate's (wandb, mlflow ...), beside the logs that are always written.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 8
    micro_batch_tokens: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    optimizer: Kind = "adamw"
    rates: dict[str, float] = field(default_factory=dict)
    layer_decay: float = 1.0
    lora_plus: float | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.06
    clip: float = 1.0
    label_smoothing: float = 0.0
    neftune: float = 0.0
    validate_every: int | None = None
    early_stopping: int | None = None
    watch: str = "loss"
    gradient_checkpointing: bool | float = False
    halve_out_of_memory: bool = False
    frozen_cache: bool = False
    shard: bool = False
    snapshots: int = 0
    checkpoint_every: int = 200
    trackers: list[str] = field(default_factory=list)
    hooks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        for key in ("micro_batch_tokens", "max_steps", "validate_every", "early_stopping"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        if self.snapshots < 0:
            raise ValueError(f"snapshots is {self.snapshots}; it must not be negative")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; it is a share of the steps, at least 0 and below 1")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        for key in ("clip", "layer_decay", "lora_plus"):
            if getattr(self, key) is not None and getattr(self, key) <= 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be above 0")
        if not 0 <= self.gradient_checkpointing <= 1:
            raise ValueError(
                f"gradient_checkpointing is {self.gradient_checkpointing}; it is true, false or a share of the blocks, from 0 to 1"
            )
        for pattern, factor in self.rates.items():
            if factor < 0:
                raise ValueError(f"the factor {factor} of {pattern!r} must not be negative")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1")
        if self.neftune < 0:
            raise ValueError(f"neftune is {self.neftune}; it must be at least 0")
        if self.shard and self.frozen_cache:
            raise ValueError("frozen_cache runs on whole weights, which shard divides: choose one")
        if self.shard and self.halve_out_of_memory:
            raise ValueError(
                "halve_out_of_memory is decided by each process alone, and with shard all run the same blocks at once: "
                "choose one"
            )
        if self.shard and self.optimizer != "adamw":
            raise ValueError(f"{self.optimizer} needs whole matrices; with shard use adamw")
        if self.shard and self.snapshots:
            raise ValueError("snapshots are scored on whole weights, which shard divides: choose one")
        if self.neftune and self.frozen_cache:
            raise ValueError("neftune puts new noise on every row, so frozen_cache has nothing to keep: choose one")

    def token_budget(self, device: str, states: int = STATES) -> int:
        """Tokens run at once on a device of this type ("cpu", "cuda"), through blocks times width of `states`."""
        if self.micro_batch_tokens or device != "cpu":
            return self.micro_batch_tokens or ACCELERATOR_TOKENS
        return min(MOST_CPU_TOKENS, CPU_TOKENS * max(1, STATES // states))

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
