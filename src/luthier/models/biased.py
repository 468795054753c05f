"""Attention with a bias by distance (T5, Raffel et al. 2020, https://arxiv.org/abs/1910.10683), plugged into transformers as
one more implementation, its gradient written out.

    P = softmax(s Q K^T + B + M)      O = P V
    dV = P^T g      dP = g V^T      dS = P * (dP - rowsum(dP * P))      dQ = s dS K      dK = s dS^T Q

B is the bias (1, H, L, S), the same in all layers of most such models; M the mask. Their sum is made once a forward pass. The
softmax is in fp32; transformers' own is in the base's precision.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "luthier_biased"
# Families whose attention hands over its bias.
FAMILIES = {"t5", "mt5", "umt5"}


def biased_attention(
    module: nn.Module,
    query: Tensor,  # (rows, H, L, d)
    key: Tensor,  # (rows, H, S, d)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Returns (rows, L, H, d)."""
    assert position_bias is not None, "these families always have a bias"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
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
