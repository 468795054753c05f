"""Attention with a bias by distance (T5, Raffel et al. 2020, https://arxiv.org/abs/1910.10683), plugged into transformers as
one more implementation, its gradient written out.

    P = softmax(s Q K^T + B + M)      O = P V
    dV = P^T g      dP = g V^T      dS = P * (dP - rowsum(dP * P))      dQ = s dS K      dK = s dS^T Q

B is the bias (1, H, L, S), the same in all layers of most such models; M the mask. Their sum is made once a forward pass. The
softmax is in fp32; transformers' own is in the base's precision. Rows run padded, or one after another, each attended on its
own (`PackedStack`), as `attended.py` says.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from luthier.models.attended import Attended, attend
from luthier.models.kernels.fused import Fused, runs_fused
from luthier.models.matmul import by_kernels
from luthier.models.packing import Piece, Plan, filler, plan_of
from luthier.models.written_out import WrittenOut, rounded_up

NAME = "luthier_biased"
# Families whose attention hands over its bias.
FAMILIES = {"t5", "mt5", "umt5"}
# Of those, the families with one bias for all layers of a stack, whose rows may stand one after another.
PACKED = {"t5", "mt5"}


@dataclass(frozen=True)
class PackedStack:
    """How the tokens of a pass through an encoder or a decoder divide into rows; handed to each of its attentions."""

    own: tuple[Piece, ...]
    across: tuple[Piece, ...] = ()
    plans: dict[bool, Plan] = field(default_factory=dict)

    def attended(self, across: bool, added: Tensor, scale: float, like: Tensor, width: int) -> Attended:
        """How one of its attentions, of heads of this width, runs; `added`, (H, longest, longest), is what all attentions to
        the same tokens add.
        """
        pieces = self.across if across else self.own
        if runs_fused(like, width):
            if across not in self.plans:  # what is summed over rows is summed by one thread
                self.plans[across] = plan_of(pieces, together=not across and added.requires_grad)
            causal = bool(self.across) and not across
            return Fused(pieces, self.plans[across], scale, causal, bias=None if across else added)
        if across:
            return WrittenOut(pieces, [None] * len(pieces), scale)
        sizes = [rounded_up(one.length) for one in pieces]
        return WrittenOut(pieces, [added[:, :size, :size] for size in sizes], scale)


def run_encoder(stack: Any, embedded: Tensor, lengths: Sequence[int]) -> Tensor:
    """T5's encoder on rows one after another: embeddings (T, D) to states (T, D)."""
    return _run(stack, embedded, lengths, None, ())


def run_decoder(
    stack: Any,
    embedded: Tensor,
    lengths: Sequence[int],
    encoded: Tensor,
    encoded_lengths: Sequence[int],
    reads: Sequence[int],
) -> Tensor:
    """T5's decoder on rows one after another: embeddings (T, D) to states (T, D), from the encoder's (T', D).

    `reads` says which of the encoder's rows each of them reads.
    """
    there = _slices(encoded_lengths)
    across = tuple(Piece(row, own, (there[reads[row]],)) for row, own in enumerate(_slices(lengths)))
    return _run(stack, embedded, lengths, encoded, across)


def _run(
    stack: Any, embedded: Tensor, lengths: Sequence[int], encoded: Tensor | None, across: tuple[Piece, ...]
) -> Tensor:
    tokens = len(embedded)
    if extra := 0 if by_kernels(embedded) else filler(tokens):
        embedded, lengths = F.pad(embedded, (0, 0, 0, extra)), (*lengths, extra)
        across = (*across, Piece(len(across), slice(tokens, tokens + extra), across[0].keys)) if across else ()
    packing = PackedStack(tuple(Piece(row, own, (own,)) for row, own in enumerate(_slices(lengths))), across)
    longest = rounded_up(max(lengths))
    added = stack.block[0].layer[0].SelfAttention.compute_bias(longest, longest, device=embedded.device)[0]
    added = added.contiguous()  # heads stand last in memory as it comes, and adding it takes eight times as long
    if encoded is not None:  # a decoder: nobody sees what comes later
        added = added + torch.full_like(added[0], float("-inf")).triu(1)
    hidden, other = embedded[None], None if encoded is None else encoded[None]
    for block in stack.block:
        hidden = block(hidden, None, added, other, None, added, packing=packing)[0]
    states: Tensor = stack.final_layer_norm(hidden)[0, :tokens]
    return states


def _slices(lengths: Sequence[int]) -> list[slice]:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return [slice(start, stop) for start, stop in pairwise(ends)]


def biased_attention(
    module: nn.Module,
    query: Tensor,  # (rows, H, L, d)
    key: Tensor,  # (rows, H, S, d)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    packing: PackedStack | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Returns (rows, L, H, d)."""
    assert position_bias is not None, "these families always have a bias"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packing is not None:
        across = bool(packing.across) and not module.is_causal
        attended = packing.attended(across, position_bias, scale, query, query.shape[-1])
        return attend(query, key, value, attended, None if across else position_bias), None
    added = _added(position_bias, attention_mask)
    if dropout or (added.requires_grad and torch.is_grad_enabled()):
        scores = query @ key.transpose(2, 3) * scale + added
        weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
        out = weights @ value
    elif query.is_cuda:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale)
    else:
        out = _Biased.apply(query, key, value, added, scale)
    return out.transpose(1, 2), None


def _added(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Bias and mask together, (1 or rows, H, L, S); the layers that get the same two share the sum."""
    if mask is None:
        return bias
    known = getattr(bias, "_with_mask", None)
    if known is None or known[0] is not mask:
        known = bias._with_mask = (mask, bias + mask)  # type: ignore[attr-defined]
    found: Tensor = known[1]
    return found


class _Biased(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, added: Tensor, scale: float) -> Tensor:
        shape = query.shape
        query, key, value = (one.reshape(-1, *one.shape[2:]) for one in (query, key, value))
        scores = torch.bmm(query if scale == 1 else query * scale, key.transpose(1, 2))
        scores.view(*shape[:3], -1).add_(added)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale, ctx.rows = scale, shape[0]
        return torch.bmm(weights, value).view(shape)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        query, key, value, weights = ctx.saved_tensors
        upstream = outputs[0].reshape(query.shape)
        into_value = torch.bmm(weights.transpose(1, 2), upstream)
        into_weights = torch.bmm(upstream, value.transpose(1, 2))
        into_scores = torch.ops.aten._softmax_backward_data(into_weights, weights, -1, weights.dtype)
        if ctx.scale != 1:
            into_scores = into_scores * ctx.scale
        into_query, into_key = torch.bmm(into_scores, key), torch.bmm(into_scores.transpose(1, 2), query)
        found = (one.view(ctx.rows, -1, *one.shape[1:]) for one in (into_query, into_key, into_value))
        return *found, None, None


AttentionInterface.register(NAME, biased_attention)
AttentionMaskInterface.register(NAME, eager_mask)
