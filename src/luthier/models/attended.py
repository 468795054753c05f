"""Attention whose gradient is written out: one function of autograd for all rows of a pass, because the gradient of a slice is a
tensor of the whole size. How it runs says an `Attended`: `written_out.py`, or on a CPU that has them kernels (`kernels/fused.py`).

    P = softmax(s Q K^T + mask)      O = P V
    dV = P^T g      dP = g V^T      dS = P * (dP - rowsum(dP * P))      dQ = s dS K      dK = s dS^T Q
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.models.scratch import Scratch

# Queries (1, H, T, d), keys and values (1, K, T', d).
Heads = tuple[Tensor, Tensor, Tensor]


class Attended(ABC):
    """Which queries see which keys, and how that is computed."""

    def kept_size(self, heads: int) -> int:
        """How many numbers of the base's precision `forward` keeps in the room that it is given."""
        return 0

    @abstractmethod
    def forward(self, heads: Heads, out: Tensor, room: Tensor, scratch: Scratch) -> list[Tensor | None]:
        """Write the attention into `out` (1, T, H, d); returns what `backward` needs. `room` is (`kept_size`,)."""

    @abstractmethod
    def backward(self, back: "WayBack", scratch: Scratch) -> None:
        """Write the gradients of the heads, and add that of the bias, of all rows."""


class WayBack(NamedTuple):
    """What attention's gradient is made of, and where it goes: those of keys and values begin with zeros, that of the bias is there
    where it is wanted, (H, longest, longest) in fp32.
    """

    upstream: Tensor  # the gradient of the output, (1, T, H, d)
    heads: Heads
    out: Tensor
    kept: list[Tensor | None]
    into: Heads
    into_bias: Tensor | None


def attend(query: Tensor, key: Tensor, value: Tensor, attended: Attended, bias: Tensor | None = None) -> Tensor:
    """query: (1, H, T, d), key and value: (1, K, T, d); returns (1, T, H, d).

    `bias`, (H, longest, longest), is what `attended` adds to scores, where it has a gradient.
    """
    return _Attend.apply(query, key, value, bias, attended)  # type: ignore[no-any-return]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, attended: Attended) -> Tensor:
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        room = query.new_empty(attended.kept_size(query.shape[1]))
        kept = attended.forward((query, key, value), out, room, Scratch())
        ctx.save_for_backward(query, key, value, bias, out, *kept)
        ctx.attended = attended
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        query, key, value, bias, out, *kept = ctx.saved_tensors
        into = _like(query), _like(key).zero_(), _like(value).zero_()
        into_bias = new_into_bias(bias) if ctx.needs_input_grad[3] else None
        ctx.attended.backward(WayBack(outputs[0], (query, key, value), out, kept, into, into_bias), Scratch())
        return *into, None if into_bias is None else into_bias.to(bias.dtype), None


def _like(heads: Tensor) -> Tensor:
    """For a gradient: laid out as what it is of, if that has each head's numbers side by side."""
    return torch.empty_like(heads) if heads.stride(-1) == 1 else heads.new_empty(heads.shape)


def new_into_bias(bias: Tensor) -> Tensor:
    """Where the gradient of a bias is summed: in fp32, there may be many rows."""
    return torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
