"""How much memory this process holds and has held at most, in bytes."""

import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Memory resident now (peak where the system tells nothing else)."""
    return _status("VmRSS") or _peak_of_process()


def before_work(device: torch.device) -> int:
    """What `peak_bytes` counts before a model is loaded: nothing on an accelerator, else what is resident now."""
    return 0 if device.type == "cuda" else resident_bytes()


def peak_bytes() -> int:
    """The most memory held so far: on an accelerator its allocator's peak, else the process's."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") or _peak_of_process()


def _status(key: str) -> int:
    if not _STATUS.is_file():
        return 0
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def _peak_of_process() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
