"""Files of weights that are mapped into memory: their pages count as the process's own as long as it keeps them."""

import ctypes
import mmap
import re
import sys
from bisect import bisect_right
from pathlib import Path

from torch import Tensor

_START = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)")


class MappedFiles:
    """The files that this process maps and has written nothing into, as of now; on Linux, elsewhere none."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, int]] = []  # [start, stop) of each, in order
        found, written = None, ""
        for line in _smaps():
            if start := _START.match(line):
                found = (int(start[1], 16), int(start[2], 16)) if start[3] != "0" else None
            elif line.startswith("Anonymous:"):  # pages written into, and below such as were swapped out
                written = line.split()[1]
            elif found and line.startswith("Swap:") and written == line.split()[1] == "0":
                self._runs.append(found)

    def let_go(self, tensor: Tensor) -> None:
        """Drop the pages that lie within a tensor, if it is in such a file; what is read again comes from there again."""
        if tensor.device.type != "cpu":
            return
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        place = bisect_right(self._runs, (start, sys.maxsize)) - 1
        if start < stop and place >= 0 and stop <= self._runs[place][1]:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def _smaps() -> list[str]:
    try:
        return Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
