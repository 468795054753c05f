"""Memory that code uses again and again for what it needs only a moment: the allocator is asked once, not at every use."""

import math

import torch
from torch import Tensor

# What whoever is at work needs until it is done: one after another they have the same place.
MOMENTS = "moments"


class Scratch:
    """Tensors by name, each valid until its name is asked for again: for what is needed only a moment."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._most = 0

    def make_room(self, tokens: int) -> None:
        """Let go of everything before the first pass over more tokens than any yet: one after another, each would leave a hole where
        nothing as large fits.
        """
        if tokens > self._most:
            self._most = tokens
            self._flat.clear()

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor of this shape, on the device and, unless told, in the precision of `like`; its numbers are arbitrary."""
        size = math.prod(shape)
        key = name, like.device, dtype or like.dtype
        flat = self._flat.get(key)
        if flat is None or flat.numel() < size:
            self._flat.pop(key, None)
            flat = self._flat[key] = torch.empty(size, dtype=key[2], device=like.device)
        return flat[:size].view(shape)
