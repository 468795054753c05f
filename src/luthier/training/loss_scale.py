"""Dynamic loss scaling (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740), for float16 alone.

    g = (gradient of s x loss) / s

Gradients below float16's least number, 6e-8, would be lost: s lifts them. Where s x loss overflows, the step is not made and s is
halved; after GROW_AFTER good steps s is doubled. For bfloat16 and float32 s is 1.
"""

import torch

START = 2.0**16
GROW_AFTER = 2000


def first_scale(dtype: torch.dtype) -> float:
    """s at the start of training a base that computes in `dtype`."""
    return START if dtype == torch.float16 else 1.0


def grown(scale: float, good_steps: int) -> float:
    """s after so many steps without an overflow."""
    return scale * 2 if scale > 1 and good_steps and good_steps % GROW_AFTER == 0 else scale
