"""Memory that code uses again and again for what it needs only a moment: the allocator is asked once, not at every use."""

import math

import torch
from torch import Tensor

# Of what is held each begins at a multiple of so many numbers: a processor reads lines of 64 bytes.
LINE = 64
# A room, for each precision, of what whoever is at work holds for a while, and behind it of what it needs until it is done.
ROOM = "room"


class Scratch:
    """Tensors by name, each valid until its name is asked for again; and a room that all share, one after another."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._held: list[tuple[torch.device, torch.dtype, int]] = []
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
            flat = None  # its place is free before the larger one is made
            self._flat.pop(key, None)
            flat = self._flat[key] = torch.empty(size, dtype=key[2], device=like.device)
        return flat[:size].view(shape)

    def moment(self, size: int, like: Tensor) -> Tensor:
        """So many numbers, valid until anybody asks for a moment again or holds more."""
        held = sum(each for *where, each in self._held if where == [like.device, like.dtype])
        return self.take(ROOM, (held + size,), like)[held:]

    def hold(self, size: int, like: Tensor, behind: int = 0) -> Tensor:
        """So many numbers, valid until they are let go; there will be moments of up to `behind`."""
        whole = -(-size // LINE) * LINE
        found = self.moment(whole + behind, like)[:size]
        self._held.append((like.device, like.dtype, whole))
        return found

    def let_go(self, last: bool = False) -> None:
        """Of what is held: all of it, or what was taken last."""
        del self._held[-1 if last else 0 :]
