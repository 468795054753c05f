"""Files that are either whole or not there."""

import json
import os
import tempfile
from pathlib import Path

from luthier.errors import UserError


def write_whole(path: Path, content: bytes) -> None:
    """Write through a temporary file, fsync and rename, so a kill or a full disk leaves the old file.

    Raises UserError where the disk is full or the folder cannot be written.
    """
    partial = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if partial and os.path.exists(partial):
            os.unlink(partial)
        raise UserError(
            f"{path} could not be written: {error.strerror}. What was there before is unchanged; "
            "free some space or choose another folder, then continue with --resume."
        ) from None


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole."""
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
