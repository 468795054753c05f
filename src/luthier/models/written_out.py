"""Attention with its scores written out and its gradient too: on a CPU, in 16 bits, faster than the fused kernel's.

    P = softmax(s Q K^T + mask)      O = P V
    dV = P^T g      dP = g V^T      dS = P * (dP - rowsum(dP * P))      dQ = s dS K      dK = s dS^T Q

The softmax is in fp32, as transformers' is. P is kept for the backward pass where it is small beside what the rest of a block
keeps, and computed again where it is not: it grows with the square of a row. One function for all pieces, because the gradient
of a slice is a tensor of the whole size; heads that share a key head stand one under the other, in one product with it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.models.packing import Piece
from luthier.models.scratch import Scratch

# P of a piece that sees more keys is computed again, by one of its six products and the softmax: of 9 heads it takes 18 bytes a
# key and token, which for 600 keys is what a block keeps of a token for everything else.
KEPT_TO = 384


def attend_written_out(
    query: Tensor, key: Tensor, value: Tensor, pieces: Sequence[Piece], masks: Sequence[Tensor], scale: float
) -> Tensor:
    """query: (1, H, T, d), key and value: (1, K, T, d), an additive mask (L, seen) for each piece; returns (1, T, H, d)."""
    return _WrittenOut.apply(query, key, value, pieces, masks, scale)  # type: ignore[no-any-return]


class _WrittenOut(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pieces: Sequence[Piece],
        masks: Sequence[Tensor],
        scale: float,
    ) -> Tensor:
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        room = query.new_empty(kept_size(query.shape[1], pieces))
        kept = attend_forward(query, key, value, pieces, masks, scale, out, room, Scratch())
        ctx.save_for_backward(query, key, value, *kept)
        ctx.pieces, ctx.masks, ctx.scale = pieces, masks, scale
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        query, key, value, *kept = ctx.saved_tensors
        into = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        attend_backward(outputs[0], query, key, value, kept, ctx.pieces, ctx.masks, ctx.scale, into, Scratch())
        return *into, None, None, None


def kept_size(heads: int, pieces: Sequence[Piece]) -> int:
    """How many numbers of P are kept for these pieces."""
    return sum(heads * piece.length * piece.seen for piece in pieces if piece.seen <= KEPT_TO)


def attend_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: Sequence[Piece],
    masks: Sequence[Tensor],
    scale: float,
    out: Tensor,
    room: Tensor,
    scratch: Scratch,
) -> list[Tensor | None]:
    """Write the attention into `out` (1, T, H, d); returns each piece's P (K, H / K * L, seen), which stands in `room`
    (`kept_size`,), None where it is not kept.
    """
    kept: list[Tensor | None] = []
    start = 0
    for piece, mask in zip(pieces, masks, strict=True):
        stop = start + kept_size(query.shape[1], [piece])
        place = room[start:stop].view(key.shape[1], -1, piece.seen) if stop > start else None
        stacked = _stacked(query, piece.own, key.shape[1], scratch, "query").mul_(scale)
        weights = _weights(stacked, piece.of(key)[0], mask, scratch, place)
        start = stop
        found = _product(weights, piece.of(value)[0], scratch, "found").view(-1, piece.length, query.shape[3])
        out[0, piece.own] = found.transpose(0, 1)
        kept.append(place)
    return kept


def attend_backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Sequence[Tensor | None],
    pieces: Sequence[Piece],
    masks: Sequence[Tensor],
    scale: float,
    into: tuple[Tensor, Tensor, Tensor],
    scratch: Scratch,
) -> None:
    """Write the gradients of query, key and value into `into`, from that of the output (1, T, H, d)."""
    upstream = upstream.transpose(1, 2)  # (1, H, T, d)
    into_query, into_key, into_value = into
    groups, width = key.shape[1], query.shape[3]
    for piece, weights, mask in zip(pieces, kept, masks, strict=True):
        own, seen = _stacked(upstream, piece.own, groups, scratch, "upstream"), piece.of(key)[0]
        stacked = _stacked(query, piece.own, groups, scratch, "query").mul_(scale)
        if weights is None:
            weights = _weights(stacked, seen, mask, scratch)
        _give(into_value, piece, _product(weights.transpose(1, 2), own, scratch, "found"))
        into_weights = _product(own, piece.of(value)[0].transpose(1, 2), scratch, "scores")
        into_scores = scratch.take("into scores", weights.shape, weights)
        torch.ops.aten._softmax_backward_data.out(into_weights, weights, -1, weights.dtype, grad_input=into_scores)
        into_rows = _product(into_scores, seen, scratch, "found").mul_(scale)
        into_query[0, :, piece.own] = into_rows.view(-1, piece.length, width)
        _give(into_key, piece, _product(into_scores.transpose(1, 2), stacked, scratch, "found"))


def _weights(scaled: Tensor, seen: Tensor, mask: Tensor, scratch: Scratch, place: Tensor | None = None) -> Tensor:
    """P of queries (K, H / K * L, d), which are scaled already, and the keys that they see, (K, seen, d); at `place`, if any."""
    scores = _product(scaled, seen.transpose(1, 2), scratch, "scores")
    scores.view(-1, *mask.shape).add_(mask)
    wide = scratch.take("wide", scores.shape, scores, torch.float32).copy_(scores)
    weights = torch.softmax(wide, -1, out=scratch.take("weights, wide", scores.shape, scores, torch.float32))
    return (scratch.take("weights", scores.shape, scores) if place is None else place).copy_(weights)


def _product(one: Tensor, other: Tensor, scratch: Scratch, name: str) -> Tensor:
    return torch.bmm(one, other, out=scratch.take(name, (len(one), one.shape[1], other.shape[2]), one))


def _give(into: Tensor, piece: Piece, gradient: Tensor) -> None:
    """Write a piece's gradient (K, seen, d) where its own keys stand, and add it where the shared ones do."""
    shared = piece.seen - piece.length
    into[0, :, piece.own] = gradient[:, shared:]
    if shared:  # a piece of its own, which came before
        into[0, :, piece.shared] += gradient[:, :shared]


def _stacked(heads: Tensor, here: slice, groups: int, scratch: Scratch, name: str) -> Tensor:
    """A copy of some tokens, the heads that share a key head one under the other: (K, H / K * L, d)."""
    some = heads[0, :, here]
    return scratch.take(name, some.shape, some).copy_(some).view(groups, -1, heads.shape[3])
