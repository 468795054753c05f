"""Data sets read through the package `datasets`: of the hub (``hub:NAME``), or a folder it saved."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from luthier.data.rows import Row
from luthier.errors import UserError, nearest

HUB = "hub:"
# Into how many a folder saved by `datasets` is cut to be streamed.
SHARDS = 16


def read_dataset(path: str, split: str | None, folder: Path) -> Iterator[Row]:
    """Rows of a data set, read from disk as they are needed.

    ``hub:NAME`` may name a configuration behind a colon (``hub:glue:sst2``). Raises UserError where the package is
    missing, the hub cannot be reached, the data set is not there, or its parts need a choice (`split`).
    """
    name = path.removeprefix(HUB).rstrip("/").rpartition("/")[2]
    part = f"[{split}]" if split else ""
    for number, values in enumerate(_open(path, split, folder), 1):
        yield Row(f"{name}{part}:{number}", dict(values))


def stream_dataset(path: str, split: str | None, folder: Path) -> list[Callable[[], Iterator[Row]]]:
    """A function a shard that reads its rows from the start, of the hub without storing them. Raises as `read_dataset`."""
    found = _open(path, split, folder, stream=True)
    count = found.num_shards
    name = path.removeprefix(HUB).rstrip("/").rpartition("/")[2] + (f"[{split}]" if split else "")

    def read(shard: int) -> Iterator[Row]:
        for number, values in enumerate(found.shard(num_shards=count, index=shard), 1):
            yield Row(f"{name} shard {shard + 1}:{number}", dict(values))

    return [partial(read, shard) for shard in range(count)]


def dataset_fingerprint(path: str, split: str | None, folder: Path) -> str:
    """The digest `datasets` keeps of a data set's content. Raises UserError as `read_dataset` does."""
    return str(_open(path, split, folder)._fingerprint)


def _open(path: str, split: str | None, folder: Path, stream: bool = False) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"Reading {path} needs the package datasets: pip install 'luthier[datasets]'.") from None
    try:
        found: Any = (
            datasets.load_dataset(*path.removeprefix(HUB).split(":", 1), streaming=stream)
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
        found = found[split or next(iter(found))]
    return found.to_iterable_dataset(num_shards=SHARDS) if stream and hasattr(found, "to_iterable_dataset") else found
