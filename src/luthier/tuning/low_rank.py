"""A product of two thin matrices beside a linear: y + s B (A x). A starts Kaiming-uniform, B at zero.

    y = x W^T + b + l B^T,   l = x A^T              (s is in B)
    dx = g W + h A,   h = g B,   dA = h^T x,   dB = g^T l        with g the upstream gradient, rows flat

One function (`_TunedProduct`) for the frozen linear and its product keeps x and l alone and adds into what is there (`models/matmul.py`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.models.grafted import Delta
from luthier.models.matmul import narrow, outer
from luthier.models.products import Plain, Product, plain


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
        added: Tensor = _AddProduct.apply(x, y, *self.thin(x.dtype))
        return added

    def as_product(self, base: nn.Module) -> Product | None:
        """The frozen linear and its product together."""
        linear = plain(base)
        if linear is None or linear.trained or (self.dropout and torch.is_grad_enabled()):
            return None
        return _TunedProduct(linear, self)

    def thin(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (r, in) and s B (out, r), cast to the precision of the activations, never the other way round."""
        return self.once(
            dtype, lambda: (self.lora_A.weight.to(dtype), _by_column(self.lora_B.weight * self.scale, dtype))
        )

    def derive(self, dtype: torch.dtype) -> None:
        """Both matrices as they are multiplied with."""
        self.thin(dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """W + scale * B A."""
        return weight + self.scale * self.lora_B.weight.float() @ self.lora_A.weight.float(), bias


class _TunedProduct(Product):
    """x W^T + b + x A^T B^T for a frozen linear."""

    reads = True

    def __init__(self, linear: Plain, delta: LowRank):
        self.linear, self.delta, self.width = linear, delta, linear.width
        self.trained = delta.lora_A.weight, delta.lora_B.weight

    def forward(self, x: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        """x: (T, in), out: (T, out)."""
        a, b = self.delta.thin(x.dtype)
        low = narrow(x, a)
        self.linear.forward(x, out, (low, b.T))
        return low, a, b

    def again(self, x: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        """x: (T, in)."""
        a, b = self.delta.thin(x.dtype)
        return narrow(x, a), a, b

    def backward_input(
        self, upstream: Tensor, kept: Sequence[Tensor], into: Tensor | None, add: bool = False
    ) -> tuple[Tensor, ...]:
        """upstream: (T, out), into: (T, in)."""
        _, a, b = kept
        into_low = narrow(upstream, b.T)
        self.linear.backward_input(upstream, (), into, add, (into_low, a))
        return (into_low,)

    def backward_weights(
        self, upstream: Tensor, x: Tensor, kept: Sequence[Tensor], passed: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """upstream: (T, out), x: (T, in)."""
        into_a, into_b = self.trained
        of_a, of_b = outer(passed[0], x), outer(kept[0], upstream)
        return [of_a.to(into_a.dtype), of_b.T.to(into_b.dtype).mul_(self.delta.scale)]


class _AddProduct(torch.autograd.Function):
    """y + x A^T B^T beside any module; x: (..., in), y: (..., out), A: (r, in), B: (out, r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low = a @ x.flatten(0, -2).T  # (r, T)
        ctx.save_for_backward(x, low, a, b)
        return torch.addmm(y.flatten(0, -2), low.T, b.T).view(y.shape)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (upstream,) = outputs
        x, low, a, b = ctx.saved_tensors
        wanted_x, _, wanted_a, wanted_b = ctx.needs_input_grad
        flat = upstream.flatten(0, -2)  # (T, out)
        into_low = b.T @ flat.T  # (r, T)
        return (
            (into_low.T @ a).view(x.shape) if wanted_x else None,
            upstream,
            into_low @ x.flatten(0, -2) if wanted_a else None,
            (low @ flat).T if wanted_b else None,
        )


def _by_column(b: Tensor, dtype: torch.dtype) -> Tensor:
    """B (out, r) in another precision, laid out as its transpose: that is read row by row."""
    return b.T.to(dtype).contiguous().T


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear; GPT-2's Conv1D stores its weight the other way round."""
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return inputs, outputs
    return module.in_features, module.out_features  # type: ignore[return-value]
