"""Packed tokens laid out as padded rows and back, as copies both ways.

The gradient of a gather is a sum into its source, done with atomic additions: slow, and in no fixed order. Here every token has
one place of its own, so each way's gradient is the other way's copy.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Which token stands at each padded place, (rows * longest,), padding repeating a row's last; and each token's place, (T,)."""

    take: Tensor
    back: Tensor

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> "Layout":
        """That of rows of these lengths, padded at their ends."""
        counts, places = torch.tensor(lengths), torch.arange(max(lengths))
        starts = counts.cumsum(0) - counts
        take = (starts[:, None] + torch.minimum(places[None, :], counts[:, None] - 1)).flatten()
        back = torch.nonzero((places[None, :] < counts[:, None]).flatten())[:, 0]
        return cls(take.to(device), back.to(device))


def padded(tokens: Tensor, layout: Layout) -> Tensor:
    """(T, ...) to (rows * longest, ...); padding must have no gradient, as where causal attention never looks."""
    return _Padded.apply(tokens, layout)  # type: ignore[no-any-return]


def unpadded(places: Tensor, layout: Layout) -> Tensor:
    """(rows * longest, ...) to (T, ...); what padding held has no gradient."""
    return _Unpadded.apply(places, layout)  # type: ignore[no-any-return]


class _Padded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return tokens.index_select(0, layout.take)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        return outputs[0].index_select(0, ctx.layout.back), None


class _Unpadded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: Tensor, layout: Layout) -> Tensor:
        ctx.layout, ctx.shape = layout, places.shape
        return places.index_select(0, layout.back)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (upstream,) = outputs
        return upstream.new_zeros(ctx.shape).index_copy_(0, ctx.layout.back, upstream), None
