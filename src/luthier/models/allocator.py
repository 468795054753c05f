"""Keep freed memory in the process: half of a CPU training step is otherwise page faults.

glibc gives every freed block above 128 KiB straight back to the system and takes it anew, zeroed
page by page, at the next step. Two `mallopt` calls stop that; elsewhere than glibc nothing happens.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Ask glibc to reuse freed blocks up to 1 GiB; return whether it agreed."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # glibc caps the threshold for mmap at 32 MiB on its own adjustment, not on ours.
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
