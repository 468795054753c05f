"""A product of two thin matrices beside a linear: y + s B (A x). A starts Kaiming-uniform, B at zero."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.models.grafted import Delta


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

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """W + scale * B A."""
        return weight + self.scale * self.lora_B.weight.float() @ self.lora_A.weight.float(), bias


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear; GPT-2's Conv1D stores its weight the other way round."""
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return inputs, outputs
    return module.in_features, module.out_features  # type: ignore[return-value]
