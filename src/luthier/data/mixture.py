"""Mixture: tasks with sampling rates, itself usable as a task; nested as deep as one likes.

A member's rate is what the recipe says, or its number of examples, at most `cap`, to the power 1/temperature
(Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 3.5.2). Within a member, forms of the prompt share
its rate. The k-th example is a function of (seed, k): each entry's places are spread evenly, and it goes through
its own rows in a new order each time.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
from pydantic import Discriminator, Tag

from luthier.data.task import Task
from luthier.errors import UserError, nearest

Form = Literal["zero_shot", "few_shot", "zero_shot_options", "few_shot_options", "chain_of_thought", "inverted"]


FORMS: tuple[Form, ...] = get_args(Form)


def _kind(given: Any) -> str:
    return "<mixture>" if isinstance(given, Mixture) or (isinstance(given, dict) and "tasks" in given) else "<task>"


@dataclass(frozen=True)
class Member:
    """A task of a mixture: its rate, and the shares of the forms in which its rows are shown.

    `few_shot` puts up to `shots` other training rows into the prompt; `_options` lists the answer choices below
    it; `chain_of_thought` and `inverted` use the task's templates of these names. A task of FLAN pairs uses the pairs its
    file has for a form, and FLAN's own few-shot delimiters.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    task: "TaskOrMixture"
    rate: float | None = None
    forms: dict[Form, float] = field(default_factory=lambda: {"zero_shot": 1.0})
    shots: int = 5

    def __post_init__(self) -> None:
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"a rate of {self.rate}; it must be above 0 (remove a task that is not wanted)")
        if not self.forms or min(self.forms.values()) < 0 or not sum(self.forms.values()) > 0:
            raise ValueError(f"forms are {self.forms}; shares are at least 0 and one of them above")
        if self.shots < 1:
            raise ValueError(f"shots is {self.shots}; it must be at least 1")
        if isinstance(self.task, Mixture) and self.forms != {"zero_shot": 1.0}:
            raise ValueError("forms belong to the tasks of an inner mixture, not to the mixture")
        if isinstance(self.task, Task) and self.task.train and self.task.train.stream:
            if self.rate is None:
                raise ValueError(f"the rows of task {self.task.name!r} are streamed and not counted: give it a `rate`")
            if set(self.forms) - {"zero_shot"}:
                raise ValueError(f"the rows of task {self.task.name!r} are streamed: its only form is zero_shot")
        for form in ("chain_of_thought", "inverted"):
            if isinstance(self.task, Task) and self.forms.get(form) and not getattr(self.task, form):
                raise ValueError(f"task {self.task.name!r} has no `{form}` template, which `forms` asks for")


@dataclass(frozen=True)
class Mixture:
    """Tasks to train on together; each is scored on its own test split.

    Either every member has a `rate` or none has one. Without, rates are proportional to the numbers of training
    rows, each at most `cap`, flattened by `temperature` (1: proportional; large: equal).
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    tasks: list[Member]
    name: str = "mixture"
    cap: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("a mixture needs at least one task")
        given = [member.rate is not None for member in self.tasks]
        if any(given) and not all(given):
            raise ValueError("some tasks have a `rate` and some have none; give all of them one, or none")
        if any(given) and (self.cap is not None or self.temperature != 1.0):
            raise ValueError("`cap` and `temperature` shape rates by size; these tasks have rates of their own")
        if self.cap is not None and self.cap < 1:
            raise ValueError(f"cap is {self.cap}; it must be at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        names = [task.name for task in self.all_tasks()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two tasks are named {twice[0]!r}; set `name` so that scores can be told apart")

    def all_tasks(self) -> list[Task]:
        """Every task, also of inner mixtures."""
        found: list[Task] = []
        for member in self.tasks:
            found += member.task.all_tasks() if isinstance(member.task, Mixture) else [member.task]
        return found

    def only(self, names: Collection[str]) -> "Mixture":
        """The same mixture with these tasks alone; raises UserError for a name that is not there."""
        for name in names:
            if name not in (known := [task.name for task in self.all_tasks()]):
                raise UserError(f"The mixture {self.name!r} has no task {name!r}. {nearest(name, known)}")
        return replace(self, tasks=list(self._kept(set(names))))

    def _kept(self, names: set[str]) -> Iterator[Member]:
        for member in self.tasks:
            if isinstance(member.task, Task):
                if member.task.name in names:
                    yield member
            elif inner := list(member.task._kept(names)):
                yield replace(member, task=replace(member.task, tasks=inner))


TaskOrMixture = Annotated[Annotated[Task, Tag("<task>")] | Annotated[Mixture, Tag("<mixture>")], Discriminator(_kind)]


@dataclass(frozen=True)
class Entry:
    """What is drawn from: a task in one form, with its share of all draws."""

    task: Task
    form: Form
    shots: int
    rate: float


def entries(mixture: Mixture, rows: Callable[[Task], int]) -> list[Entry]:
    """The mixture written out flat, rates summing to 1; `rows` tells a task's number of training rows."""
    return _entries(mixture, rows, 1.0)


def _entries(mixture: Mixture, rows: Callable[[Task], int], whole: float) -> list[Entry]:
    sizes = [member.rate or _size(mixture, member.task, rows) ** (1 / mixture.temperature) for member in mixture.tasks]
    found: list[Entry] = []
    for member, size in zip(mixture.tasks, sizes, strict=True):
        rate = whole * size / sum(sizes)
        if isinstance(member.task, Mixture):
            found += _entries(member.task, rows, rate)
            continue
        total = sum(member.forms.values())
        for form in FORMS:  # not as a recipe happens to list them: that must not change what is drawn
            if share := member.forms.get(form):
                found.append(Entry(member.task, form, member.shots, rate * share / total))
    return found


def _size(mixture: Mixture, task: "Task | Mixture", rows: Callable[[Task], int]) -> float:
    if isinstance(task, Mixture):
        return sum(_size(task, member.task, rows) for member in task.tasks)
    count = rows(task)
    if not count:
        raise UserError(f"The task {task.name!r} of mixture {mixture.name!r} has no training rows (`train`).")
    return min(mixture.cap or count, count)


def epoch_size(mixture: Mixture, rows: Callable[[Task], int]) -> int:
    """Draws in one epoch: the rows of all tasks, each task's at most its cap."""
    return round(_size(mixture, mixture, rows))


class Draws:
    """The endless order of draws: `at(k)` is (entry, row), a function of the seed and k alone.

    Draws come in blocks; in each, every entry has its share to within one, in an order of the block's own. So after
    any number of blocks an entry has been drawn as often as its rate says, to within one.
    """

    BLOCK = 1024

    def __init__(self, rates: Sequence[float], rows: Sequence[int], seed: int):
        self.rates, self.rows, self.seed = np.asarray(rates, dtype=np.float64), list(rows), seed
        # Where an entry stands between two of its draws at the start: else all rare entries would come at once.
        self._phase = np.random.default_rng([seed, 11]).random(len(self.rates))
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    def at(self, k: int) -> tuple[int, int]:
        """The entry and the row of draw `k` (from 0)."""
        entry, occurrence = self.occurrence(k)
        return entry, self.row(entry, occurrence)

    def row(self, entry: int, occurrence: int) -> int:
        """The row of an entry that is drawn after so many others of it."""
        turn, place = divmod(occurrence, self.rows[entry])
        return scattered(place, self.rows[entry], f"{self.seed} {entry} {turn}")

    def occurrence(self, k: int) -> tuple[int, int]:
        """The entry of draw `k`, and how many times it was drawn before."""
        block = k // self.BLOCK
        while self._before(block).sum() > k:
            block -= 1
        while (after := self._before(block + 1)).sum() <= k:
            block += 1
        if self._block is None or self._block[0] != block:
            before = self._before(block)
            counts = after - before
            drawn = np.repeat(np.arange(len(counts)), counts)
            drawn = drawn[np.random.default_rng([self.seed, 13, block]).permutation(len(drawn))]
            self._block = (block, drawn, before)
        _, drawn, before = self._block
        place = k - int(before.sum())
        entry = int(drawn[place])
        return entry, int(before[entry]) + int((drawn[:place] == entry).sum())

    def counts(self, draws: int) -> list[int]:
        """How often each entry stands among the first `draws`."""
        if not draws:
            return [0] * len(self.rows)
        self.occurrence(draws - 1)
        assert self._block is not None
        _, drawn, before = self._block
        inside = np.bincount(drawn[: draws - int(before.sum())], minlength=len(self.rows))
        return [int(count) for count in before + inside]

    def _before(self, block: int) -> np.ndarray:
        """Draws of each entry before a block."""
        whole: np.ndarray = np.floor(block * self.BLOCK * self.rates + self._phase).astype(np.int64)
        return whole


def scattered(place: int, count: int, key: str) -> int:
    """Where `place` goes in a shuffle of range(count) that is never written out.

    A Feistel network on the next power of four, walked until it falls inside (Black and Rogaway 2002).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    digest = hashlib.sha256(key.encode()).digest()
    keys = [int.from_bytes(digest[start : start + 8], "little") for start in range(0, 32, 8)]
    while True:
        left, right = place >> half, place & mask
        for one in keys:
            mixed = (right ^ one) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 32 & mask)
        place = left << half | right
        if place < count:
            return place


# FLAN 2022 (Chung et al., https://arxiv.org/abs/2210.11416; the public code): weight, cap and forms of each source.
_FOUR = {"zero_shot_options": 1.0, "few_shot_options": 1.0, "zero_shot": 1.0, "few_shot": 1.0}
_TWO = {"zero_shot_options": 1.0, "few_shot_options": 1.0}
FLAN2022: dict[str, tuple[float, int, dict[str, float]]] = {
    "muffin": (0.4, 30_000, _FOUR),
    "t0": (0.32, 20_000, _FOUR),
    "niv2": (0.2, 5_000, _TWO),
    "cot": (0.05, 100_000, _TWO),
    "dialog": (0.03, 200_000, _TWO),
}
# Sources of inverted forms (from answer to question) stand inside their source, at this weight against its 1.
INVERTED = {"cot_inverted": "cot", "dialog_inverted": "dialog"}
INVERTED_WEIGHT = 0.3


def flan2022(sources: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The members of a mixture with FLAN 2022's weights, caps and forms, as a recipe would write them.

    `sources` maps muffin, t0, niv2, cot, dialog, and cot_inverted and dialog_inverted, to tasks; those that are left
    out are, and the rest keep their ratios. Raises UserError for another source.
    """
    allowed = [*FLAN2022, *INVERTED]
    for name in sources:
        if name not in allowed:
            raise UserError(f"The preset flan2022 has no source {name!r}. {nearest(str(name), allowed)}")
    members: list[dict[str, Any]] = []
    for name, (weight, _, _) in FLAN2022.items():
        inverted = [part for part, of in INVERTED.items() if of == name and sources.get(part)]
        direct = _capped(name, name, sources[name]) if sources.get(name) else None
        if direct and not inverted:
            members.append({"task": direct, "rate": weight})
        elif inverted:
            parts = [{"task": direct, "rate": 1.0}] if direct else []
            parts += [{"task": _capped(part, name, sources[part]), "rate": INVERTED_WEIGHT} for part in inverted]
            members.append({"task": {"name": f"{name} both ways", "tasks": parts}, "rate": weight})
    return members


def _capped(name: str, of: str, tasks: Sequence[Any]) -> dict[str, Any]:
    _, cap, forms = FLAN2022[of]
    return {"name": name, "cap": cap, "tasks": [{"task": task, "forms": dict(forms)} for task in tasks]}
