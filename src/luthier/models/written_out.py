"""Attention with its scores written out, by PyTorch's products: on a CPU, in 16 bits, faster than the fused kernel's.

The softmax is in fp32, as transformers' is. P is kept for the backward pass where it is small beside what the rest of a block
keeps, and computed again where it is not: it grows with the square of a row. Heads that share a key head stand one under the other,
in one product with it.

Queries and keys are copied into places of rounded sizes, the rest zeros, whose scores as keys are -inf. A CPU's library of products
makes a kernel for every new shape, which takes longer than running it, and rows of odd lengths are slow in all that follows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.models.attended import Attended, Heads, WayBack
from luthier.models.packing import Piece, tokens_in
from luthier.models.scratch import Scratch

# P of a piece that sees more keys is computed again, by one of its six products and the softmax: of 9 heads it takes 18 bytes a
# key and token, which for 600 keys is what a block keeps of a token for everything else.
KEPT_TO = 384
# Sizes are rounded up to multiples of this.
PLACES = 32


def rounded_up(size: int) -> int:
    """The places that so many queries or keys take."""
    return -(-size // PLACES) * PLACES


class WrittenOut(Attended):
    """Pieces, and for each a mask that is added to its scores, (L, seen) or (H, L, seen), sizes rounded up, or None; `scale` is
    the scores' factor.
    """

    def __init__(self, pieces: Sequence[Piece], masks: Sequence[Tensor | None], scale: float):
        self.pieces, self.masks, self.scale = pieces, masks, scale

    def kept_size(self, heads: int) -> int:
        """How many numbers of P are kept."""
        return _kept_size(heads, self.pieces)

    def forward(self, heads: Heads, out: Tensor, room: Tensor, scratch: Scratch) -> list[Tensor | None]:
        """Kept: each piece's P (K, H / K * L, seen), L and seen rounded up, which stands in `room`, None where it is not kept."""
        query, key, value = heads
        kept: list[Tensor | None] = []
        start, groups = 0, key.shape[1]
        for piece, mask in zip(self.pieces, self.masks, strict=True):
            stop = start + _kept_size(query.shape[1], [piece])
            place = room[start:stop].view(groups, -1, rounded_up(piece.seen)) if stop > start else None
            scaled = _queries(query, piece, groups, scratch, "query", self.scale)
            weights = _weights(scaled, _copy(key, piece.keys, scratch, "key"), piece, mask, scratch, place)
            start = stop
            found = _product(weights, _copy(value, piece.keys, scratch, "value"), scratch, "found")
            out[0, piece.own] = _by_head(found, piece, query).transpose(0, 1)
            kept.append(place)
        return kept

    def backward(self, back: WayBack, scratch: Scratch) -> None:
        """Adds up the gradients of keys and values, piece by piece."""
        upstream = back.upstream.transpose(1, 2)  # (1, H, T, d)
        query, key, value = back.heads
        into_query, into_key, into_value = back.into
        groups, scale = key.shape[1], self.scale
        for piece, weights, mask in zip(self.pieces, back.kept, self.masks, strict=True):
            own, seen = _queries(upstream, piece, groups, scratch, "upstream"), _copy(key, piece.keys, scratch, "key")
            scaled = _queries(query, piece, groups, scratch, "query", scale)
            if weights is None:
                weights = _weights(scaled, seen, piece, mask, scratch)
            _add(into_value, piece, _product(weights.transpose(1, 2), own, scratch, "into keys"))
            into_weights = _product(own, _copy(value, piece.keys, scratch, "value").transpose(1, 2), scratch, "scores")
            into_scores = scratch.take("into scores", weights.shape, weights)
            torch.ops.aten._softmax_backward_data.out(into_weights, weights, -1, weights.dtype, grad_input=into_scores)
            if back.into_bias is not None:
                by_head = into_scores.view(query.shape[1], -1, into_scores.shape[2])
                back.into_bias[:, : by_head.shape[1], : by_head.shape[2]] += by_head
            found = _by_head(_product(into_scores, seen, scratch, "found"), piece, query)
            if scale == 1:
                into_query[0, :, piece.own] = found
            else:
                torch.mul(found, scale, out=into_query[0, :, piece.own])
            _add(into_key, piece, _product(into_scores.transpose(1, 2), scaled, scratch, "into keys"))


def _kept_size(heads: int, pieces: Sequence[Piece]) -> int:
    return sum(heads * rounded_up(one.length) * rounded_up(one.seen) for one in pieces if one.seen <= KEPT_TO)


def _weights(
    scaled: Tensor, seen: Tensor, piece: Piece, mask: Tensor | None, scratch: Scratch, place: Tensor | None = None
) -> Tensor:
    """P of queries (K, H / K * L, d), which are scaled already, and the keys that they see, (K, seen, d); at `place`, if any."""
    scores = _product(scaled, seen.transpose(1, 2), scratch, "scores")
    if mask is not None:
        scores.view(-1, *mask.shape).add_(mask)
    if piece.seen < scores.shape[2]:
        scores[:, :, piece.seen :] = float("-inf")
    into = scratch.take("weights", scores.shape, scores) if place is None else place
    if scores.dtype == torch.float32:
        return torch.softmax(scores, -1, out=into)
    wide = scratch.take("wide", scores.shape, scores, torch.float32).copy_(scores)
    weights = torch.softmax(wide, -1, out=scratch.take("weights, wide", scores.shape, scores, torch.float32))
    return into.copy_(weights)


def _product(one: Tensor, other: Tensor, scratch: Scratch, name: str) -> Tensor:
    return torch.bmm(one, other, out=scratch.take(name, (len(one), one.shape[1], other.shape[2]), one))


def _add(into: Tensor, piece: Piece, gradient: Tensor) -> None:
    """Add the gradient of what a piece sees, (K, seen, d), where that stands."""
    start = 0
    for run in piece.keys:
        stop = start + tokens_in(run)
        into[0, :, run] += gradient[:, start:stop]
        start = stop


def _copy(heads: Tensor, runs: Sequence[slice], scratch: Scratch, name: str, scale: float = 1) -> Tensor:
    """A copy of some tokens of (1, H, T, d) with zeros behind, (H, L, d)."""
    _, count, _, width = heads.shape
    places = rounded_up(sum(map(tokens_in, runs)))
    copy = scratch.take(name, (count, places, width), heads)
    start = 0
    for run in runs:
        stop = start + tokens_in(run)
        if scale == 1:
            copy[:, start:stop] = heads[0, :, run]
        else:
            torch.mul(heads[0, :, run], scale, out=copy[:, start:stop])
        start = stop
    if start < places:
        copy[:, start:] = 0
    return copy


def _queries(heads: Tensor, piece: Piece, groups: int, scratch: Scratch, name: str, scale: float = 1) -> Tensor:
    """A copy of a piece's own tokens, the heads that share a key head one under the other: (K, H / K * L, d)."""
    return _copy(heads, (piece.own,), scratch, name, scale).view(groups, -1, heads.shape[3])


def _by_head(stacked: Tensor, piece: Piece, query: Tensor) -> Tensor:
    """(K, H / K * L, d) as (H, the piece's queries, d)."""
    return stacked.view(query.shape[1], -1, query.shape[3])[:, : piece.length]
