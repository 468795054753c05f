"""Keep freed memory in the process: half of a CPU training step is otherwise page faults.

glibc gives every freed block above 128 KiB straight back to the system and takes it anew, zeroed
page by page, at the next step. Two `mallopt` calls stop that; elsewhere than glibc nothing happens.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

# Larger blocks go back at once: there are few, and between smaller ones they tear holes that nothing fits.
LARGEST_KEPT = 32 << 20


def give_back_freed_memory() -> None:
    """Return free pages inside the heap to the system: rows of many lengths leave holes that add up over steps."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def keep_freed_memory() -> bool:
    """Ask glibc to reuse freed blocks up to 32 MiB from one heap; return whether it agreed.

    One arena, because backward runs in a thread of its own: what it frees is then forward's to take.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    wanted = ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, LARGEST_KEPT), (_M_TRIM_THRESHOLD, (1 << 31) - 1))
    return all(bool(mallopt(option, value)) for option, value in wanted)
