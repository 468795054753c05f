"""Where gradients stand while the passes of a step add them up."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import Parameter

# Gradients of at most this many bytes are made early; larger ones are taken over from the pass that makes them first, without a copy.
SMALL = 1 << 20


@contextmanager
def made_early(parameters: Iterable[Parameter]) -> Iterator[None]:
    """Within it small gradients are there before the first pass: made between a pass's tensors, and kept when these are freed, they
    would leave holes in the heap that the next pass's do not fit. A parameter that no pass met has none afterwards.
    """
    made: list[tuple[Parameter, int]] = []
    for one in parameters:
        if one.grad is None and one.requires_grad and one.numel() * one.element_size() <= SMALL:
            one.grad = torch.zeros_like(one)
            made.append((one, one.grad._version))
    try:
        yield
    finally:
        for one, version in made:
            if one.grad is not None and one.grad._version == version:
                one.grad = None
