"""Data sets read through the package `datasets`: of the hub (``hub:NAME``), or a folder it saved."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.data.rows import Row
from luthier.errors import UserError, nearest

HUB = "hub:"


def read_dataset(path: str, split: str | None, folder: Path) -> Iterator[Row]:
    """Rows of a data set, read from disk as they are needed.

    ``hub:NAME`` may name a configuration behind a colon (``hub:glue:sst2``). Raises UserError where the package is
    missing, the hub cannot be reached, the data set is not there, or its parts need a choice (`split`).
    """
    name = path.removeprefix(HUB).rstrip("/").rpartition("/")[2]
    part = f"[{split}]" if split else ""
    for number, values in enumerate(_open(path, split, folder), 1):
        yield Row(f"{name}{part}:{number}", dict(values))


def dataset_fingerprint(path: str, split: str | None, folder: Path) -> str:
    """The digest `datasets` keeps of a data set's content. Raises UserError as `read_dataset` does."""
    return str(_open(path, split, folder)._fingerprint)


def _open(path: str, split: str | None, folder: Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"Reading {path} needs the package datasets: pip install 'luthier[datasets]'.") from None
    try:
        found: Any = (
            datasets.load_dataset(*path.removeprefix(HUB).split(":", 1))
            if path.startswith(HUB)
            else datasets.load_from_disk(str(folder / Path(path).expanduser()))
        )
    except Exception as error:  # whatever the package, the network or the files raise
        reason = " ".join(str(error).split())[:200]
        what = (
            "Is the name right, and is there a network (HF_HUB_OFFLINE=1 forbids it)?" if path.startswith(HUB) else ""
        )
        raise UserError(
            f"The data set {path} could not be read: {type(error).__name__}: {reason}. {what}".strip()
        ) from None
    if isinstance(found, dict):
        if split is None and len(found) > 1:
            raise UserError(
                f"The data set {path} has several parts: name one with `split`. Allowed: {', '.join(found)}."
            )
        if split is not None and split not in found:
            raise UserError(f"The data set {path} has no part {split!r}. {nearest(split, found)}")
        return found[split or next(iter(found))]
    return found
