"""Leaks: held-out rows that stand in the training rows, word for word or nearly, of their own task or of another.

Word for word: the marks of the prompts are equal. Nearly: of the row's word sequences, without those that many
held-out rows share (the template's), at least NEAR stand in one training row.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from luthier.data.audit import Reading, asked
from luthier.data.findings import Finding, Level, finding
from luthier.data.marks import SHINGLE, Marks, mark, shingles
from luthier.data.task import SPLITS, Example, Examples, Split

NEAR = 0.8
# Word sequences in more than this share of the rows, or this many, are the template's, not the rows'.
BOILERPLATE, COMMON = 0.2, 1000
# Bytes of the table that says at once of most word sequences that no held-out row has them.
TABLE = 1 << 26

# Where a held-out row was met: in its own task's training rows, in another task's, or (a test row) in validation rows.
Where = Literal["own", "other", "validation"]
Key = tuple[int, Split, int]  # task, split and place of a held-out row
Tasks = Sequence[tuple[str, Examples]]
Readings = Sequence[dict[Split, Reading]]
# A held-out row, a training row's place in its task, how many of the held-out row's sequences it has.
Hit = tuple[int, int, int]


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows of all tasks, and what of their word sequences is their own."""

    places: list[Key]  # of each row
    counts: NDArray[np.int64]  # (rows,) sequences of its own
    sequences: Marks  # (all sequences,) sorted
    owners: NDArray[np.int32]  # (all sequences,) the row that has it

    def save(self, folder: Path) -> None:
        """Write the arrays, so that worker processes map them instead of receiving them."""
        for name in ("counts", "sequences", "owners"):
            np.save(folder / f"held-{name}.npy", getattr(self, name))


class Near:
    """Finds, in training rows, those that hold most of a held-out row; it can be sent to a worker process."""

    def __init__(self, train: Sequence[Example], held: HeldOut | Path):
        self.train, self._held = train, held
        self._loaded: tuple[NDArray[np.int64], Marks, NDArray[np.int32], NDArray[np.bool_]] | None = None

    def __getstate__(self) -> tuple[Sequence[Example], "HeldOut | Path"]:
        return self.train, self._held

    def __setstate__(self, state: tuple[Sequence[Example], "HeldOut | Path"]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __call__(self, places: range) -> list[Hit]:
        """Every pair of a held-out row and a training row at `places` that are nearly equal."""
        counts, sequences, owners, table = self._arrays()
        found: list[Hit] = []
        if not len(sequences):
            return found
        for place in places:
            own = shingles(mark(asked(self.train[place]))[1])
            own = own[table[own & np.uint64(len(table) - 1)]]
            if not len(own):
                continue
            first, last = np.searchsorted(sequences, own, "left"), np.searchsorted(sequences, own, "right")
            met = np.concatenate([owners[start:stop] for start, stop in zip(first, last, strict=True)])
            rows, shared = np.unique(met, return_counts=True)
            near = shared >= NEAR * counts[rows]
            found += [(int(row), place, int(count)) for row, count in zip(rows[near], shared[near], strict=True)]
        return found

    def _arrays(self) -> tuple[NDArray[np.int64], Marks, NDArray[np.int32], NDArray[np.bool_]]:
        if self._loaded is None:
            if isinstance(self._held, Path):
                counts, sequences, owners = (
                    np.load(self._held / f"held-{name}.npy", mmap_mode="r")
                    for name in ("counts", "sequences", "owners")
                )
            else:
                counts, sequences, owners = self._held.counts, self._held.sequences, self._held.owners
            size = min(TABLE, 1 << max(10, 3 + len(sequences).bit_length()))
            table = np.zeros(size, np.bool_)
            table[sequences & np.uint64(size - 1)] = True
            self._loaded = (counts, sequences, owners, table)
        return self._loaded


def in_this_process(train: Sequence[Example], held: HeldOut) -> Iterator[list[Hit]]:
    """All training rows in one stretch."""
    yield Near(train, held)(range(len(train)))


def find_leaks(
    tasks: Tasks,
    readings: Readings,
    search: Callable[[Sequence[Example], HeldOut], Iterable[list[Hit]]] = in_this_process,
) -> list[list[Finding]]:
    """Of each task, its held-out rows that stand in training rows, its own or another task's, and its test rows that
    stand in its validation rows.

    `search` goes through the rows of a split, here or in other processes.
    """
    exact = _exact(readings)
    held = _held_out(readings, taken=set(exact))
    near: dict[Key, dict[Where, tuple[int, int, int]]] = {}
    for number, (_, examples) in enumerate(tasks):
        for split in SPLITS[:2]:
            for hits in search(getattr(examples, split), held):
                for row, place, count in hits:
                    owner = held.places[row]
                    where = _where(owner, number, split)
                    if where and count > near.setdefault(owner, {}).get(where, (0,))[0]:
                        near[owner][where] = (count, number, place)
    found: list[list[Finding]] = []
    for number, (_, examples) in enumerate(tasks):
        found.append([])
        for split in SPLITS[1:]:
            here = [key for key in sorted({*exact, *near}) if key[0] == number and key[1] == split]
            found[-1] += _told(tasks, number, split, getattr(examples, split), here, exact, near)
    return found


def _where(owner: Key, task: int, split: Split) -> Where | None:
    """What it means that a held-out row was met in a split of a task; None where it means nothing."""
    if split == "train":
        return "own" if owner[0] == task else "other"
    return "validation" if owner[0] == task and owner[1] == "test" else None


def _exact(readings: Readings) -> dict[Key, dict[Where, tuple[int, int]]]:
    """Held-out rows whose mark another row has: the (task, place) of the first such row, by where it stands."""
    sizes = [len(one["train"].prompts) for one in readings]
    marks = np.concatenate([one["train"].prompts for one in readings])
    order = np.argsort(marks, kind="stable")
    inorder, starts = marks[order], np.cumsum([0, *sizes])
    found: dict[Key, dict[Where, tuple[int, int]]] = {}
    for number, one in enumerate(readings):
        for split in SPLITS[1:]:
            first = np.searchsorted(inorder, one[split].prompts, "left")
            last = np.searchsorted(inorder, one[split].prompts, "right")
            for place in np.flatnonzero(last > first).tolist():
                met = found.setdefault((number, split, place), {})
                for train in order[first[place] : last[place]].tolist():
                    task = int(np.searchsorted(starts, train, "right")) - 1
                    met.setdefault("own" if task == number else "other", (task, train - int(starts[task])))
        validation, every = np.unique(one["validation"].prompts, return_index=True)
        if len(validation):
            spots = np.minimum(np.searchsorted(validation, one["test"].prompts), len(validation) - 1)
            for place in np.flatnonzero(validation[spots] == one["test"].prompts).tolist():
                found.setdefault((number, "test", place), {})["validation"] = (number, int(every[spots[place]]))
    return found


def _held_out(readings: Readings, taken: set[Key]) -> HeldOut:
    places: list[Key] = []
    counts: list[int] = []
    pieces: list[Marks] = []
    for number, one in enumerate(readings):
        for split in SPLITS[1:]:
            rows = [
                (place, own)
                for place, own in enumerate(one[split].shingles)
                if (number, split, place) not in taken and len(own)
            ]
            if not rows:
                continue
            every, often = np.unique(np.concatenate([own for _, own in rows]), return_counts=True)
            common = every[often > max(2, min(COMMON, BOILERPLATE * len(rows)))]
            for place, own in rows:
                kept = own[~np.isin(own, common)] if len(common) else own
                if len(kept) >= SHINGLE:
                    places.append((number, split, place))
                    counts.append(len(kept))
                    pieces.append(kept)
    sequences = np.concatenate(pieces) if pieces else np.empty(0, np.uint64)
    owners = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    order = np.argsort(sequences, kind="stable")
    return HeldOut(places, np.array(counts, np.int64), sequences[order], owners[order])


# Of each place a row may be met in: how it is called when the rows are equal, the level, why it matters.
_TOLD: dict[Where, tuple[str, Level, str]] = {
    "own": ("also in training", "error", "The score would measure memory: remove these rows from training."),
    "other": (
        "in another task's training",
        "error",
        "The score would measure memory: this prompt is trained on under another task's name.",
    ),
    "validation": (
        "also in validation",
        "warning",
        "Which weights are kept was decided on this row: the score is a little better than on new ones.",
    ),
}


def _told(
    tasks: Tasks,
    number: int,
    split: Split,
    rows: Sequence[Example],
    keys: list[Key],
    exact: dict[Key, dict[Where, tuple[int, int]]],
    near: dict[Key, dict[Where, tuple[int, int, int]]],
) -> list[Finding]:
    """The findings of one split: word for word and nearly, by where the rows were met."""
    found: list[Finding] = []
    for where, (kind, level, why) in _TOLD.items():

        def met(task: int, place: int, where: Where = where) -> str:
            other: Sequence[Example] = tasks[task][1].validation if where == "validation" else tasks[task][1].train
            return other[place].id if task == number else f"{tasks[task][0]} {other[place].id}"

        equal = [(rows[key[2]], exact[key][where]) for key in keys if where in exact.get(key, {})]
        close = [(rows[key[2]], near[key][where][1:]) for key in keys if where in near.get(key, {})]
        found += finding(
            kind, level, split, [row.id for row, _ in equal],
            f"{equal[0][0].id} = {met(*equal[0][1])}: {equal[0][0].prompt}" if equal else "", why,
        )  # fmt: skip
        found += finding(
            f"nearly {kind.removeprefix('also ')}", "warning", split, [row.id for row, _ in close],
            f"{close[0][0].id} ~ {met(*close[0][1])}" if close else "",
            f"At least {NEAR:.0%} of the row's word sequences stand in one row there.",
        )  # fmt: skip
    return found
