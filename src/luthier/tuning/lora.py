"""LoRA: low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    y = W x + (alpha / r) B A x        A: (r, in), B: (out, r)

A starts Kaiming-uniform and B at zero, so a fresh LoRA changes nothing. Only A and B are trained:
r (in + out) numbers for each target of in x out.

    q_proj: Linear   ->   q_proj: Grafted(base=Linear, deltas={name: LowRank(A, B)})
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.models.base import BaseModel
from luthier.models.grafts import Delta
from luthier.tuning.method import Defaults, match_modules

_PEFT_PREFIX = "base_model.model."


class LowRank(Delta):
    """The product B A beside one linear: y + scale * B(A x), computed in the precision of x."""

    def __init__(self, features: tuple[int, int], rank: int, scale: float, dropout: float, generator: torch.Generator):
        super().__init__()
        inputs, outputs = features
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_B.weight)
        self.scale = scale
        self.dropout = dropout

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x: (..., in), y: (..., out), the base's output for x."""
        if self.dropout and torch.is_grad_enabled():
            x = F.dropout(x, self.dropout)
        # The small matrices are cast to the activations' precision, never the other way round.
        low = F.linear(x, self.lora_A.weight.to(x.dtype))
        return y + F.linear(low, (self.lora_B.weight * self.scale).to(x.dtype))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + scale * B A."""
        return weight + self.scale * self.lora_B.weight.float() @ self.lora_A.weight.float(), bias


@dataclass(frozen=True)
class LoRA:
    """Train a product of two thin matrices beside each target linear.

    `targets` is `all-linear` (every linear but the output head), a shell pattern, a regular expression
    over whole module paths, a last name, or a list of these. The product is scaled by alpha / rank.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    defaults: ClassVar[Defaults] = Defaults(learning_rate=1e-3)

    method: Literal["lora"] = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")

    def attach(self, base: BaseModel, name: str, generator: torch.Generator) -> None:
        """Graft a LowRank on every target."""
        for path, module in match_modules(base, self.targets, (nn.Linear, Conv1D)).items():
            delta = LowRank(features(module), self.rank, self.alpha / self.rank, self.dropout, generator)
            base.grafts.graft_module(path, name, delta.to(base.device))

    def virtual_tokens(self) -> int:
        """None."""
        return 0

    def peft_config(self, base: BaseModel, name: str) -> dict[str, Any]:
        """A PEFT LoraConfig."""
        paths = match_modules(base, self.targets, (nn.Linear, Conv1D))
        return {
            "peft_type": "LORA",
            "task_type": "SEQ_2_SEQ_LM" if base.encoder_decoder else "CAUSAL_LM",
            "base_model_name_or_path": base.spec.model,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": sorted(paths),
            "fan_in_fan_out": any(isinstance(module, Conv1D) for module in paths.values()),
            "bias": "none",
            "inference_mode": True,
        }

    def to_file(self, base: BaseModel, owned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's keys."""
        return {_PEFT_PREFIX + key: tensor for key, tensor in owned.items()}

    def from_file(self, base: BaseModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From PEFT's keys."""
        return {key.removeprefix(_PEFT_PREFIX): tensor for key, tensor in tensors.items()}


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear; GPT-2's Conv1D stores its weight the other way round."""
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)  # type: ignore[return-value]
