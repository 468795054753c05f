"""Attention with its scores written out and its gradient too: on a CPU, in 16 bits, faster than the fused kernel's.

    P = softmax(s Q K^T + mask)      O = P V
    dV = P^T g      dP = g V^T      dS = P * (dP - rowsum(dP * P))      dQ = s dS K      dK = s dS^T Q

The softmax is in fp32, as transformers' is. One function for all pieces, because the gradient of a slice is a tensor of the
whole size; heads that share a key head stand one under the other, in one product with it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.models.packing import Piece


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
        kept = []
        for piece, mask in zip(pieces, masks, strict=True):
            scores = torch.bmm(_stacked(query, piece.own, key.shape[1]).mul_(scale), piece.of(key)[0].transpose(1, 2))
            scores.view(-1, *mask.shape).add_(mask)
            weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
            found = torch.bmm(weights, piece.of(value)[0]).view(-1, piece.length, query.shape[3])
            out[0, piece.own] = found.transpose(0, 1)
            kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.pieces, ctx.scale = pieces, scale
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        upstream = outputs[0].transpose(1, 2)  # (1, H, T, d)
        query, key, value, *kept = ctx.saved_tensors
        into_query, into_key, into_value = map(torch.empty_like, (query, key, value))
        groups, width = key.shape[1], query.shape[3]
        for piece, weights in zip(ctx.pieces, kept, strict=True):
            own = _stacked(upstream, piece.own, groups)
            _give(into_value, piece, torch.bmm(weights.transpose(1, 2), own))
            into_weights = torch.bmm(own, piece.of(value)[0].transpose(1, 2))
            into_scores = torch.ops.aten._softmax_backward_data(into_weights, weights, -1, weights.dtype)
            into_rows = torch.bmm(into_scores, piece.of(key)[0]).mul_(ctx.scale)
            into_query[0, :, piece.own] = into_rows.view(-1, piece.length, width)
            stacked = _stacked(query, piece.own, groups).mul_(ctx.scale)
            _give(into_key, piece, torch.bmm(into_scores.transpose(1, 2), stacked))
        return into_query, into_key, into_value, None, None, None


def _give(into: Tensor, piece: Piece, gradient: Tensor) -> None:
    """Write a piece's gradient (K, seen, d) where its own keys stand, and add it where the shared ones do."""
    shared = piece.seen - piece.length
    into[0, :, piece.own] = gradient[:, shared:]
    if shared:  # a piece of its own, which came before
        into[0, :, piece.shared] += gradient[:, :shared]


def _stacked(heads: Tensor, here: slice, groups: int) -> Tensor:
    """A copy of some tokens, the heads that share a key head one under the other: (K, H / K * L, d)."""
    return heads[0, :, here].clone(memory_format=torch.contiguous_format).view(groups, -1, heads.shape[3])
