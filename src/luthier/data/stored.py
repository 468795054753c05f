"""Examples on disk: read when asked for, so that a task of a million rows takes no memory."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from luthier.cached import mapped
from luthier.data.lazy import Lazy
from luthier.data.task import Example, Frame

_DEFAULTS = {one.name: one.default for one in fields(Example)}


class StoredExamples(Lazy[Example]):
    """The examples of one split of a prepared task; its `key` is a digest of all they were made from."""

    def __init__(self, folder: Path, split: str, count: int):
        self.folder, self.split, self._count = folder, split, count
        self._text, self._places = folder / f"{split}.jsonl", folder / f"{split}.ends"
        self.key = f"{folder.name}-{split}"

    def __len__(self) -> int:
        return self._count

    def at(self, place: int) -> Example:
        """The example at `place`, read from its file."""
        start, stop = self._ends(place)
        text = mapped(self._text)[start:stop]
        return unpacked(json.loads(text.decode("utf-8", "surrogatepass")))

    def __iter__(self) -> Iterator[Example]:
        """Read the file from end to end; it is not held in memory."""
        if self._count:
            with self._text.open("rb") as file:
                for line in file:
                    yield unpacked(json.loads(line.decode("utf-8", "surrogatepass")))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"StoredExamples({str(self.folder)!r}, {self.split!r}, {self._count})"

    def _ends(self, place: int) -> tuple[int, int]:
        ends = np.frombuffer(mapped(self._places), dtype=np.int64)
        return (int(ends[place - 1]) if place else 0), int(ends[place])


class ExampleFile:
    """Writes the examples of one split."""

    def __init__(self, folder: Path, split: str):
        self._text: BinaryIO = (folder / f"{split}.jsonl").open("wb")
        self._ends: BinaryIO = (folder / f"{split}.ends").open("wb")
        self.count = self._end = 0

    def add(self, line: bytes) -> None:
        """Append one packed example."""
        self._text.write(line)
        self._end += len(line)
        self._ends.write(self._end.to_bytes(8, "little"))
        self.count += 1

    def close(self) -> None:
        """Finish both files."""
        self._text.close()
        self._ends.close()


def packed(example: Example) -> bytes:
    """An example as a line of JSON, without what is as by default."""
    values = {name: value for name, value in vars(example).items() if name == "id" or value != _DEFAULTS.get(name)}
    if example.frame:
        values["frame"] = tuple(vars(example.frame).values())
    if values.get("references") == (example.completion,):
        values["references"] = 1  # the completion itself
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"


def unpacked(values: dict[str, Any]) -> Example:
    """The example that `packed` wrote."""
    references = values.get("references", ())
    return Example(
        id=values["id"],
        prompt=values.get("prompt", ""),
        completion=values.get("completion", ""),
        references=(values.get("completion", ""),) if references == 1 else tuple(references),
        choices=tuple(values.get("choices", ())),
        system=values.get("system"),
        shots=tuple((question, answer) for question, answer in values.get("shots", ())),
        learnt=values.get("learnt", 0),
        frame=Frame(*values["frame"]) if "frame" in values else None,
        blank=tuple(values.get("blank", ())),
        null=tuple(values.get("null", ())),
    )
