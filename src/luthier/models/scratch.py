"""Memory that code uses again and again for what it needs only a moment: the allocator is asked once, not at every use."""

import math
from collections.abc import Iterable

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

    def lent(self) -> "Scratch":
        """Itself to who trains. Who does not has no use for memory that stays: another one, and what training left is let go."""
        if torch.is_grad_enabled():
            return self
        self.empty()
        return Scratch()

    def make_room(self, tokens: int) -> None:
        """Let go of everything before the first pass over more tokens than any yet: one after another, each would leave a hole where
        nothing as large fits.
        """
        if tokens > self._most:
            self.empty()
            self._most = tokens

    def empty(self) -> None:
        """Let go of all places; who has a tensor in one keeps it."""
        self._most = 0
        self._flat.clear()

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor of this shape, on the device and, unless told, in the precision of `like`; its numbers are arbitrary."""
        size = math.prod(shape)
        return self._place((name, like.device, dtype or like.dtype), size).narrow(0, 0, size).view(shape)

    def _place(self, key: tuple[str, torch.device, torch.dtype], size: int) -> Tensor:
        """At least so many numbers."""
        flat = self._flat.get(key)
        if flat is None or flat.numel() < size:
            flat = None  # its place is free before the larger one is made
            self._flat.pop(key, None)
            flat = self._flat[key] = torch.empty(size, dtype=key[2], device=key[1])
        return flat

    def moment(self, size: int, like: Tensor) -> Tensor:
        """So many numbers, valid until anybody asks for a moment again or holds more."""
        held = sum(each for *where, each in self._held if where == [like.device, like.dtype])
        return self._place((ROOM, like.device, like.dtype), held + size).narrow(0, held, size)

    def hold(self, size: int, like: Tensor) -> Tensor:
        """So many numbers, valid until they are let go."""
        found = self.moment(size, like)
        self._held.append((like.device, like.dtype, _whole_lines(size)))
        return found

    def expect(self, needs: Iterable[tuple[int, int]], like: Tensor) -> None:
        """Make the room large enough for what will be held, one after another, and the moments behind each: grown step by step, it would
        leave holes.
        """
        held = most = 0
        for size, moments in needs:
            held += _whole_lines(size)
            most = max(most, held + moments)
        self.moment(most, like)

    def let_go(self, last: bool = False) -> None:
        """Of what is held: all of it, or what was taken last."""
        del self._held[-1 if last else 0 :]


def _whole_lines(size: int) -> int:
    return -(-size // LINE) * LINE
