"""Building the kernels: once a machine, by its own C compiler, into the cache; where that cannot be, they are not used.

They need AVX-512 with bfloat16 (Intel since Cooper Lake, AMD since Zen 4); products take AMX's units where there are some (Intel since
Sapphire Rapids). OpenMP's functions are those that PyTorch has loaded, so both share its threads.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch  # noqa: F401 - whose OpenMP is theirs

from luthier.cached import cached, digest
from luthier.errors import UserError

SOURCES = ("product.c", "attention.c", "thin.c", "rows.c", "step.c")
HEADERS = ("vectors.h", "lanes.h", "units.h", "tiles.h", "panels.h")
FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-unused-function"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mtune=native"),
)
WITH_UNITS = ("-mamx-tile", "-mamx-bf16")
# Set to 0, it keeps them from being built and used; to avx512, from using AMX.
SWITCH = "LUTHIER_KERNELS"
SECONDS = 120  # that a compiler may take; it takes about two

INT, LONG, FLOAT, PLACE = ctypes.c_int, ctypes.c_long, ctypes.c_float, ctypes.c_void_p


class Heads(ctypes.Structure):
    """Numbers of (tokens, heads, d): address, strides in numbers."""

    _fields_ = (("at", PLACE), ("token", LONG), ("head", LONG))


class PlanOf(ctypes.Structure):
    """Which tokens see which, as `attention.c` says."""

    _fields_ = (
        *((name, PLACE) for name in ("flat", "at", "units", "shared")),
        *(("unit_count", LONG), ("shared_count", LONG)),
    )


class How(ctypes.Structure):
    """How attention runs, as `attention.c` says."""

    _fields_ = (
        *((name, LONG) for name in ("query_heads", "key_heads", "width", "causal", "window", "bias_row")),
        ("bias", PLACE),
        ("scale", FLOAT),
    )


class BackwardOf(ctypes.Structure):
    """What attention's gradient reads and writes, as `attention.c` says."""

    _fields_ = (
        *((name, Heads) for name in ("q", "k", "v", "out", "upstream", "into_q", "into_k", "into_v")),
        *(("lse", PLACE), ("into_bias", PLACE), ("sums", PLACE), ("tokens", LONG), ("rows", LONG)),
    )


ARGUMENTS = {
    "luthier_product": (*9 * (PLACE,), *4 * (LONG,), INT, INT),
    "luthier_gradient": (PLACE, PLACE, PLACE, PLACE, LONG, LONG, LONG),
    "luthier_attend": (ctypes.POINTER(PlanOf), ctypes.POINTER(How), Heads, Heads, Heads, Heads, PLACE, LONG),
    "luthier_attend_backward": (ctypes.POINTER(PlanOf), ctypes.POINTER(How), ctypes.POINTER(BackwardOf)),
    "luthier_narrow": (PLACE, PLACE, PLACE, LONG, LONG, LONG),
    "luthier_widen": (PLACE, PLACE, PLACE, LONG, LONG, LONG),
    "luthier_outer": (PLACE, PLACE, PLACE, LONG, LONG, LONG),
    "luthier_norm": (PLACE, PLACE, PLACE, PLACE, LONG, LONG, FLOAT, INT),
    "luthier_norm_backward": (PLACE, PLACE, PLACE, PLACE, PLACE, PLACE, LONG, LONG),
    "luthier_norm_weight": (PLACE, PLACE, PLACE, PLACE, LONG, LONG),
    "luthier_rotate": (PLACE, PLACE, PLACE, PLACE, LONG, LONG, LONG, FLOAT),
    "luthier_cross_entropy": (PLACE, PLACE, PLACE, PLACE, LONG, LONG, FLOAT),
    "luthier_activate": (INT, PLACE, PLACE, PLACE, LONG),
    "luthier_squares": (PLACE, PLACE, LONG, LONG),
    "luthier_adamw": (*5 * (PLACE,), LONG, *7 * (ctypes.c_double,)),
    "luthier_activate_backward": (INT, PLACE, PLACE, PLACE, PLACE, PLACE, PLACE, LONG),
}


@cache
def library() -> ctypes.CDLL | str:
    """The kernels, built where they are not yet; or why there are none."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    if not _has("avx512_bf16"):
        return "the processor has no AVX-512 with bfloat16"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "gcc", "gcc", "cc"))), None)
    if compiler is None:
        return "there is no C compiler"
    try:
        return load(built(compiler, has_units() and os.environ.get(SWITCH) != "avx512"))
    except (OSError, subprocess.SubprocessError, UserError, AttributeError) as error:
        return f"building them failed ({_short(error)})"


@cache
def has_units() -> bool:
    """Whether this process may use AMX's units; it asks the system for that (arch_prctl, ARCH_REQ_XCOMP_PERM for tile data)."""
    return _has("amx_bf16") and ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


@cache
def _has(instructions: str) -> bool:
    about = Path("/proc/cpuinfo")
    return about.exists() and f" {instructions}" in about.read_text(encoding="utf-8")


def load(path: Path) -> ctypes.CDLL:
    """A built library; raises OSError where it cannot be loaded, or another user put it there, AttributeError where it is another one."""
    if path.stat().st_uid != os.geteuid():
        raise OSError(f"{path} belongs to another user")
    found = ctypes.CDLL(str(path))
    for name, arguments in ARGUMENTS.items():
        getattr(found, name).argtypes = arguments
        getattr(found, name).restype = None
    return found


def built(compiler: str, units: bool = False) -> Path:
    """The library in the cache, made where it is not there; `units`, for a processor with AMX.

    Raises OSError, SubprocessError or UserError where it cannot be made.
    """
    folder = Path(__file__).parent
    version = _run([compiler, "--version"])
    texts = [(folder / name).read_text(encoding="utf-8") for name in (*HEADERS, *SOURCES)]

    flags = (*FLAGS, *WITH_UNITS) if units else FLAGS

    def make(into: Path) -> None:
        _compile([compiler, *flags], folder, into / "kernels.so")

    # Tuned for one processor, and for no other though several may share the cache.
    key = digest([texts, flags, version, _processor()])
    return cached("kernels", key, make) / "kernels.so"


def _compile(compiler: list[str], folder: Path, into: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="luthier-kernels-") as aside:
        objects = []
        for name in SOURCES:
            objects.append(str(Path(aside) / f"{name}.o"))
            _run([*compiler, "-c", str(folder / name), "-o", objects[-1]])
        # OpenMP is left open here: with -fopenmp a second runtime would come in, with threads of its own.
        _run([*compiler[:1], "-shared", *objects, "-lm", "-o", str(into)])


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=True).stdout


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if line.startswith("model name")), "")


def _short(error: Exception) -> str:
    said = getattr(error, "stderr", None) or str(error)
    return " ".join(str(said).split())[:200]
