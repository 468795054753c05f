"""Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864) in transformers' layout: channel i turns with i + d/2.

    y1 = x1 cos - x2 sin      y2 = x2 cos + x1 sin            the gradient turns back: -sin in the place of sin

Each product is rounded before the sum, as transformers' are.
"""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, part: Tensor) -> Tensor:
    """x and out: (T, H, d); cos and sin: (T, 1, d), each half the same; part: (T, H, d / 2), to compute in."""
    half = x.shape[-1] // 2
    first, second, cos, sin = x[..., :half], x[..., half:], cos[..., :half], sin[..., :half]
    torch.mul(first, cos, out=out[..., :half]).sub_(torch.mul(second, sin, out=part))
    torch.mul(second, cos, out=out[..., half:]).add_(torch.mul(first, sin, out=part))
    return out
