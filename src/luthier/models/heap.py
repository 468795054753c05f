"""Heap: the memory that glibc's malloc holds for a run of tensors, by its own rules (https://sourceware.org/glibc/wiki/MallocInternals).

    resident = highest end of the heap so far - pages given back and not used again + blocks mapped now

A request takes the smallest free chunk that fits it and leaves the rest free; free neighbours become one; what fits nowhere
lengthens the heap, which is given back only where that is asked for (`allocator.py`). Larger blocks are mapped one by one.

PyTorch asks for numbers at multiples of 64 bytes. Glibc then takes 96 bytes more and frees what it cut off at both ends, and the
objects that belong to a tensor settle there. The place of a freed tensor so no longer fits one of the same size: a third of
the heap of a training step can be such holes.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

from luthier.models.allocator import LARGEST_KEPT

ALIGNMENT, LEAST, HEADER, PAGE = 64, 32, 16, 4096
# Per size up to 1,040 bytes glibc keeps seven freed chunks apart, which join no neighbour.
APART, APART_TO = 7, 1040
# Bytes of what PyTorch makes beside a tensor's numbers: the tensor, its storage, its shape, what frees it.
RECORDS = (200, 80, 56, 40)

Chunk = tuple[int, int]  # start, size
Place = tuple[Chunk, ...]  # the chunks of one tensor and its records; empty where its numbers are mapped


class Heap:
    """What is free, and the most that was resident (bytes)."""

    def __init__(self, mapped_from: int = LARGEST_KEPT) -> None:
        self.most = self._highest = self._mapped = self._away = 0
        self._end = ALIGNMENT - HEADER
        self._mapped_from = mapped_from
        self._by_size: list[tuple[int, int]] = []  # (size, start) of the free chunks
        self._size_at: dict[int, int] = {}  # start -> size of the free chunks
        self._start_of: dict[int, int] = {}  # end -> start of the free chunks
        self._apart: dict[int, list[int]] = {}  # size -> starts of the small ones
        self._absent: list[tuple[int, int]] = []  # (start, end) of the pages given back, in order, `_away` bytes in all

    @property
    def resident(self) -> int:
        """Bytes in memory now."""
        return self._highest - self._away + self._mapped

    def restart(self) -> None:
        """Count the most from here on."""
        self.most = self.resident

    def give_back(self) -> None:
        """Give the whole pages of free chunks back, as `give_back_freed_memory` does."""
        self._highest = self._end
        pages = ((-(-start // PAGE) * PAGE, (start + size) // PAGE * PAGE) for start, size in self._size_at.items())
        self._absent = sorted((first, last) for first, last in pages if first < last)
        self._away = _bytes(self._absent)

    def take(self, size: int) -> Place:
        """Where a tensor of so many bytes and its records are put."""
        if size >= self._mapped_from:
            self._mapped += -(-size // PAGE) * PAGE
            place: Place = ()
        else:
            place = (*(self._fit(_chunk(one)) for one in RECORDS), self._aligned(_chunk(size)))
        self.most = max(self.most, self.resident)
        return place

    def free(self, place: Place, size: int) -> None:
        """Take back the tensor of so many bytes that was put there."""
        if not place:
            self._mapped -= -(-size // PAGE) * PAGE
        for start, held in reversed(place):
            self._release(start, held)

    def _aligned(self, need: int) -> Chunk:
        start, size = self._fit(need + ALIGNMENT + LEAST)
        lead = -(start + HEADER) % ALIGNMENT
        if lead:
            lead += ALIGNMENT if lead < LEAST else 0
            self._release(start, lead)
        start, size = start + lead, size - lead
        if size - need < LEAST:
            return start, size
        self._release(start + need, size - need)
        return start, need

    def _fit(self, need: int) -> Chunk:
        if need <= APART_TO and self._apart.get(need):
            return self._apart[need].pop(), need
        place = bisect_left(self._by_size, (need, 0))
        if place == len(self._by_size):
            start, self._end = self._end, self._end + need
            self._highest = max(self._highest, self._end)
            return start, need
        size, start = self._by_size[place]
        self._remove(start)
        if size - need < LEAST:
            need = size
        else:
            self._add(start + need, size - need)
        self._use(start, start + need)
        return start, need

    def _use(self, start: int, end: int) -> None:
        """Pages between these places are in memory again."""
        first = bisect_left(self._absent, start, key=lambda one: one[1])
        last = bisect_left(self._absent, end, key=lambda one: one[0])
        cut = self._absent[first:last]
        if cut:
            sides = (cut[0][0], start // PAGE * PAGE), (-(-end // PAGE) * PAGE, cut[-1][1])
            self._absent[first:last] = left = [side for side in sides if side[0] < side[1]]
            self._away -= _bytes(cut) - _bytes(left)

    def _release(self, start: int, size: int) -> None:
        if size <= APART_TO and len(apart := self._apart.setdefault(size, [])) < APART:
            apart.append(start)
            return
        end = start + size
        if end in self._size_at:
            end += self._remove(end)
        if start in self._start_of:
            start = self._start_of[start]
            self._remove(start)
        if end == self._end:
            self._end = start
        else:
            self._add(start, end - start)

    def _add(self, start: int, size: int) -> None:
        insort(self._by_size, (size, start))
        self._size_at[start], self._start_of[start + size] = size, start

    def _remove(self, start: int) -> int:
        size = self._size_at.pop(start)
        del self._start_of[start + size]
        del self._by_size[bisect_left(self._by_size, (size, start))]
        return size


def _chunk(size: int) -> int:
    return max(LEAST, -(-(size + HEADER // 2) // HEADER) * HEADER)


def _bytes(spans: Sequence[tuple[int, int]]) -> int:
    return sum(end - start for start, end in spans)
