"""Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864) in transformers' layout: channel i turns with i + d/2.

    y1 = x1 cos - x2 sin      y2 = x2 cos + x1 sin            the gradient turns back: -sin in the place of sin

Each product is rounded before the sum, as transformers' are.
"""

import torch
from torch import Tensor

from luthier.models.kernels.calls import kernels_for
from luthier.models.scratch import Scratch


def rotate(x: Tensor, cos: Tensor, sin: Tensor, scratch: Scratch, back: bool = False) -> Tensor:
    """In its place, x (T, H, d); cos and sin: (T, 1, d), each half the same."""
    turns = all(one.shape == (len(x), 1, x.shape[2]) and one.dtype == x.dtype for one in (cos, sin))
    if turns and (kernels := kernels_for(x)):
        kernels.rotate(x, cos.contiguous(), sin.contiguous(), x, back)
        return x
    half = x.shape[-1] // 2
    sin = -sin if back else sin
    first, second, cos, sin = x[..., :half], x[..., half:], cos[..., :half], sin[..., :half]
    of_first, of_second = (scratch.take(name, (*x.shape[:2], half), x) for name in ("part", "part too"))
    torch.mul(first, sin, out=of_first)
    torch.mul(second, sin, out=of_second)
    first.mul_(cos).sub_(of_second)
    second.mul_(cos).add_(of_first)
    return x
