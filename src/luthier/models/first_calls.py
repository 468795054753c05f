"""First calls of the math library's functions, by one thread."""

from functools import cache

import torch

# Those that PyTorch hands to MKL's vector math on x86; elsewhere calling them once is harmless.
FUNCTIONS = (
    *("cos", "sin", "tan", "acos", "asin", "atan", "tanh", "exp", "expm1", "erf", "erfc", "erfinv"),
    *("log", "log2", "log10", "log1p", "sqrt", "rsqrt"),
)


@cache
def call_once() -> None:
    """Call each function once on tensors too small to be divided among threads.

    Each of MKL's functions looks for the processor's variant in its first call; where two threads make that call together, one
    of them may compute by another variant, whose last bits differ (seen with `cos` and `sin`, in one process of 800:
    `benchmarks/first_calls.py`). Then the first pass of a process, whose rotations these are, was not the pass of every other.
    """
    for dtype in (torch.float32, torch.float64):
        # 0.5 is in the domain of all; on the CPU whatever the default device is.
        small = torch.full((16,), 0.5, dtype=dtype, device="cpu")
        for name in FUNCTIONS:
            getattr(torch, name)(small)
