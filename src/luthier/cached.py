"""Cached folders: made once from content that their name is a digest of, whole or not there.

A folder is written beside its place and renamed into it, so two processes that make the same one do not meet. What is
incomplete, or was changed since, is removed and made again. Folders unused for long are removed.
"""

import hashlib
import importlib.util
import json
import mmap
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from luthier.errors import UserError

SEAL = "whole.json"
UNUSED_DAYS = 30
# What code is in.
SOURCES = (".py", ".c", ".h")
# A file changed this recently may change again within the same tick of its clock.
SETTLED_SECONDS = 2.0
# Files up to this size are told whole by a checksum.
SMALL = 1 << 16


def cache_folder() -> Path:
    """Where downloads and prepared rows live: $LUTHIER_CACHE, or `luthier` in the user's cache directory."""
    if given := os.environ.get("LUTHIER_CACHE"):
        return Path(given).expanduser()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "luthier"


def digest(value: Any) -> str:
    """A digest of anything JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:32]


@cache
def code_digest(*packages: str) -> str:
    """A digest of the source of these packages: what they make is made anew once they change."""
    digest_ = hashlib.sha256()
    for package in packages:
        found = importlib.util.find_spec(package)
        assert found is not None and found.origin is not None, package
        for path in sorted(one for one in Path(found.origin).parent.rglob("*") if one.suffix in SOURCES):
            digest_.update(f"{path.name} ".encode() + path.read_bytes())
    return digest_.hexdigest()[:16]


@cache
def installed(package: str) -> str:
    """The version of an installed package."""
    return version(package)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content; remembered for as long as its size, times and place on the disk stay the same."""
    state = path.stat()
    seen = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev]
    note = cache_folder() / "digests" / hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]
    try:
        known = json.loads(note.read_text())
        if known["seen"] == seen:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - max(state.st_mtime, state.st_ctime) > SETTLED_SECONDS:
        _note(note, {"seen": seen, "sha256": found})
    return found


def cached(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder `kind`/`key` of the cache, made by `make` where it is not there whole.

    Raises UserError where the cache cannot be written.
    """
    folder = cache_folder() / kind / key
    if _whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _tidy(folder.parent)
        partial = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        make(partial)
        _seal(partial)
        if not _whole(folder):  # another process may have been first
            shutil.rmtree(folder, ignore_errors=True)
            try:
                partial.rename(folder)
            except OSError:
                if not _whole(folder):
                    raise
    except OSError as error:
        raise _unwritable(folder, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def mapped(path: Path) -> mmap.mmap | bytes:
    """A file's bytes, mapped into memory, not read; the pages touched do not stay resident for long."""
    global _asked
    _asked += 1
    if not _asked % FORGET_EVERY:
        for one in _maps.values():
            if isinstance(one, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                one.madvise(mmap.MADV_DONTNEED)
    if path not in _maps:
        if len(_maps) >= MAPS:
            _maps.pop(next(iter(_maps)))
        with path.open("rb") as file:
            empty = not os.fstat(file.fileno()).st_size
            _maps[path] = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _maps[path]


# Each map holds a file open, and processes may open a thousand or so.
MAPS = 128
# A random read brings in 64 KB of pages: after this many, those of all maps are let go (the system still caches them).
FORGET_EVERY = 4096
_maps: dict[Path, mmap.mmap | bytes] = {}
_asked = 0


def _whole(folder: Path) -> bool:
    """Whether every file is there as it was written; a folder that is not so is removed."""
    try:
        sealed = json.loads((folder / SEAL).read_text())
        sound = all(
            (state := (folder / name).stat()).st_size == size
            and state.st_mtime_ns == changed
            and (size > SMALL or zlib.crc32((folder / name).read_bytes()) == checksum)
            for name, (size, changed, checksum) in sealed.items()
        )
    except FileNotFoundError:
        sound = not folder.exists()
        if sound:
            return False
    except (OSError, ValueError, TypeError, AttributeError):
        sound = False
    if not sound:
        for path in [path for path in _maps if path.parent == folder]:
            del _maps[path]
        shutil.rmtree(folder, ignore_errors=True)
        return False
    with suppress(OSError):  # a cache that may only be read
        os.utime(folder / SEAL)
    return True


def _seal(folder: Path) -> None:
    """Note each file's size, time and, of a small one, checksum: so only large ones must be on the disk by now."""
    seal = {}
    for path in sorted(folder.iterdir()):
        state = path.stat()
        checksum = 0
        if state.st_size > SMALL:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            checksum = zlib.crc32(path.read_bytes())
        seal[path.name] = (state.st_size, state.st_mtime_ns, checksum)
    (folder / SEAL).write_text(json.dumps(seal))


def _tidy(parent: Path) -> None:
    """Remove what was left half-written and what nobody used for long."""
    limit = time.time() - UNUSED_DAYS * 86400
    for folder in parent.iterdir():
        seal = folder / SEAL
        try:
            last = (seal if seal.is_file() else folder).stat().st_mtime
        except OSError:
            continue
        if last < (limit if seal.is_file() else time.time() - 86400):
            shutil.rmtree(folder, ignore_errors=True)


def _note(path: Path, value: object) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(value, file)
        os.replace(partial, path)
    except OSError:
        pass  # it is only a note: the digest is computed again


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"The cache {folder.parent} cannot be written: {error.strerror or error}. Free some space, or set "
        "LUTHIER_CACHE to a folder that can."
    )
