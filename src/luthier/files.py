"""Files that are either whole or not there."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from luthier.errors import UserError


def plain_name(name: str) -> bool:
    """Whether a name may be part of a path as it is: letters, digits, '-' and '_' only."""
    return bool(name) and all(sign.isalnum() or sign in "-_" for sign in name)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary file to write; then fsync and rename it, so a kill or a full disk leaves the old one.

    Raises UserError where the disk is full or the folder cannot be written.
    """
    partial = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        yield Path(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{path} could not be written: {reason}. What was there before is unchanged; "
            "free some space or choose another folder, then continue with --resume."
        ) from None
    finally:
        if partial and os.path.exists(partial):
            os.unlink(partial)


def remove_partial(path: Path) -> None:
    """Remove what writers of `path` that were killed left beside it; nobody may be writing it."""
    for left in path.parent.glob(f".{path.name}-*"):
        left.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path` to fill; then rename it, so that `path` appears whole or not at all.

    Raises UserError where `path` is there already (an empty folder may be), and where the disk is full.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists already and nothing is ever overwritten; give another folder with --out.")
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        os.chmod(partial, 0o777 & ~_umask())
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{path} could not be written: {reason}. Nothing was left there; free some space or choose another folder."
        ) from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    """The process's mask for new files: temporary folders are made for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_whole(path: Path, content: bytes) -> None:
    """Write bytes as a whole file."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole; JSON has no infinite number and no NaN, so these are null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(path, f"{text}\n".encode())


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value
