"""Audit: what is wrong with the rows, by id, before anything is trained. Text only; tokens are `encoding.audit`'s.

An error stops a run; a warning goes into its report. Every check names the rows it found, and is silent on sound data.
Rows are read once, in stretches that can be read by several processes (`read_text`); what a stretch leaves behind
(`Reading`) is a few bytes a row, from which the checks that compare rows are made.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from luthier.data.findings import Finding, Level, finding
from luthier.data.marks import Marks, mark, shingles
from luthier.data.task import Example

# A length is extreme at this multiple of the median, and only where it is also long in itself.
EXTREME, EXTREME_CHARACTERS = 20, 2000
ONE_SIDED = 0.95
# Of larger held-out splits a sample of the word sequences is kept, the same in every text: see `kept_sequences`.
ALL_SEQUENCES = 20_000

# UTF-8 read as Latin-1, replacement signs, and control characters but tab and line ends.
_BROKEN = re.compile(r"\ufffd|[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

# Defects of one row: level, and what to do.
KINDS: dict[str, tuple[Level, str]] = {
    "no target": (
        "error", "There is nothing to learn: after '|||' the template renders nothing, or an answer of the chat is empty.",
    ),
    "no prompt": ("error", "The template renders nothing before '|||' for these rows: fill or remove them."),
    "null field": (
        "error", "The template writes None for a column that is null ({shown}): fill it, or let the template leave it out.",
    ),
    "empty field": ("warning", "A column that the template uses is empty ({shown}): is that meant?"),
    "empty reference": (
        "error", "A row without a human answer cannot be scored: fill the column named in `references`.",
    ),
    "answer not among the choices": (
        "error", "Correct the answer or `choices`: such a row can never be answered right.",
    ),
    "suspicious encoding": (
        "warning", "Bytes were read in another encoding, or control characters are left: save the file as UTF-8.",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Defect:
    """A defect seen in a row: its kind, what to show of it, and how much there is of it (tokens cut, say)."""

    kind: str
    shown: str
    amount: int = 0


@dataclass
class Reading:
    """What reading some rows of a split leaves behind, in the order of the rows."""

    places: dict[str, list[int]] = field(default_factory=dict)  # rows by kind of defect
    shown: dict[str, str] = field(default_factory=dict)  # of the first row of a kind
    amount: dict[str, int] = field(default_factory=dict)  # the most of a kind
    prompts: Marks = field(default_factory=lambda: np.empty(0, np.uint64))  # (rows,)
    answers: Marks = field(default_factory=lambda: np.empty(0, np.uint64))  # (rows,)
    lengths: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))  # characters of each answer
    labels: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))  # place in the choices, or -1
    choices: set[tuple[str, ...]] = field(default_factory=set)  # two at most: more say no more
    shingles: list[Marks] = field(default_factory=list)  # of each row; of held-out splits only

    def note(self, place: int, defect: Defect) -> None:
        """Count a defect of the row at `place`."""
        rows = self.places.setdefault(defect.kind, [])
        if not rows or rows[-1] != place:
            rows.append(place)
        self.shown.setdefault(defect.kind, defect.shown[:300])
        self.amount[defect.kind] = max(self.amount.get(defect.kind, 0), defect.amount)

    def extend(self, later: "Reading") -> None:
        """Add what was left behind by the rows that follow; arrays are joined by `joined`."""
        for kind, rows in later.places.items():
            self.places.setdefault(kind, []).extend(rows)
            self.shown.setdefault(kind, later.shown[kind])
            self.amount[kind] = max(self.amount.get(kind, 0), later.amount[kind])
        self.choices = set(sorted(self.choices | later.choices)[:2])
        self.shingles += later.shingles


def joined(readings: Sequence[Reading]) -> Reading:
    """The reading of stretches that follow one another."""
    whole = Reading()
    for one in readings:
        whole.extend(one)
    for name in ("prompts", "answers", "lengths", "labels"):
        if readings:
            setattr(whole, name, np.concatenate([getattr(one, name) for one in readings]))
    return whole


def read_text(rows: Sequence[Example], places: range, one_in: int = 0) -> Reading:
    """Read the rows at `places`; and of their word sequences one in `one_in` (a power of two; 0: none)."""
    found = Reading()
    prompts, answers, lengths, labels = [], [], [], []
    for place in places:
        row = rows[place]
        for defect in _defects(row):
            found.note(place, defect)
        number, words = mark(asked(row))
        prompts.append(number)
        answers.append(mark(row.completion)[0])
        lengths.append(len(row.completion))
        labels.append(row.choices.index(row.completion) if row.completion in row.choices else -1)
        if row.choices and len(found.choices) < 2:
            found.choices.add(row.choices)
        if one_in:
            own = shingles(words)
            found.shingles.append(own[own & np.uint64(one_in - 1) == 0] if one_in > 1 else own)
    found.prompts, found.answers = np.array(prompts, np.uint64), np.array(answers, np.uint64)
    found.lengths, found.labels = np.array(lengths, np.int32), np.array(labels, np.int32)
    return found


def kept_sequences(rows: int) -> int:
    """One in how many word sequences is kept of a held-out split of so many rows."""
    return 1 << max(0, -(-rows // ALL_SEQUENCES) - 1).bit_length()


def asked(row: Example) -> str:
    """All that is asked in a row: its prompt, in a conversation behind the earlier exchanges."""
    return "\n".join([*(text for pair in row.shots for text in pair), row.prompt]) if row.learnt else row.prompt


def _defects(row: Example) -> Iterator[Defect]:
    learnt = row.shots[len(row.shots) - row.learnt :]
    if not row.completion or not all(answer for _, answer in learnt):
        yield Defect("no target", row.prompt)
    if not row.prompt:
        yield Defect("no prompt", row.completion)
    if row.null:
        yield Defect("null field", ", ".join(row.null))
    elif row.blank and row.prompt and row.completion:
        yield Defect("empty field", ", ".join(row.blank))
    if row.completion and not all(one.strip() for one in row.references):
        yield Defect("empty reference", "")
    if row.choices and row.completion and row.completion not in row.choices:
        yield Defect("answer not among the choices", f"{row.completion!r}, choices: {', '.join(row.choices)}")
    text = f"{asked(row)}\n{row.completion}"
    if broken := _BROKEN.search(text):
        yield Defect("suspicious encoding", repr(text[max(0, broken.start() - 20) : broken.end() + 20]))


def row_findings(
    rows: Sequence[Example], reading: Reading, split: str, kinds: dict[str, tuple[Level, str]]
) -> list[Finding]:
    """The findings of `kinds` in a split, each with the ids of its rows; `{amount}` in an advice is filled."""
    found: list[Finding] = []
    for kind, (level, advice) in kinds.items():
        if kind in reading.places:
            ids = [rows[place].id for place in reading.places[kind]]
            said = advice.replace("{amount}", str(reading.amount[kind])).replace("{shown}", reading.shown[kind])
            found += finding(kind, level, split, ids, reading.shown[kind], said)
    return found


def training_findings(rows: Sequence[Example], reading: Reading) -> list[Finding]:
    """What comparing the training rows with one another shows: duplicates, lengths, labels."""
    return [*_repeated(rows, reading), *_lengths(rows, reading), *_balance(rows, reading)]


def _repeated(rows: Sequence[Example], reading: Reading) -> list[Finding]:
    order = np.argsort(reading.prompts, kind="stable")
    starts = np.flatnonzero(np.diff(reading.prompts[order], prepend=np.uint64(0)) != 0)
    if len(order) and (not len(starts) or starts[0]):
        starts = np.concatenate([[0], starts])
    same: list[int] = []
    unlike: list[int] = []
    for group in np.split(order, starts[1:]):
        if len(group) > 1:
            if len(np.unique(reading.answers[group])) == 1:
                same += group[1:].tolist()
            else:
                unlike += group.tolist()
    same, unlike = sorted(same), sorted(unlike)
    return [
        *finding(
            "duplicate", "warning", "train", [rows[place].id for place in same], rows[same[0]].prompt if same else "",
            "The same prompt and answer stand more than once: they count that many times in the loss.",
        ),
        *finding(
            "one prompt, several answers", "warning", "train", [rows[place].id for place in unlike],
            rows[unlike[0]].prompt if unlike else "", "The same prompt has different answers: no model can give both.",
        ),
    ]  # fmt: skip


def _lengths(rows: Sequence[Example], reading: Reading) -> list[Finding]:
    if len(rows) < 10:
        return []
    usual = max(1.0, float(np.median(reading.lengths)))
    long = np.flatnonzero(reading.lengths > max(EXTREME * usual, EXTREME_CHARACTERS)).tolist()
    return finding(
        "extreme length", "warning", "train", [rows[place].id for place in long], rows[long[0]].completion if long else "",
        f"The answer is over {EXTREME} times as long as usual ({usual:.0f} characters): is it one answer?",
    )  # fmt: skip


def _balance(rows: Sequence[Example], reading: Reading) -> list[Finding]:
    if len(reading.choices) != 1 or len(rows) < 20:  # choices of their own for each row have no balance
        return []
    choices = next(iter(reading.choices))
    counts = Counter(reading.labels[reading.labels >= 0].tolist())
    table = ", ".join(f"{choice}: {counts[place]}" for place, choice in enumerate(choices))
    never = [choice for place, choice in enumerate(choices) if not counts[place]]
    top, most = counts.most_common(1)[0] if counts else (0, 0)
    one_sided = np.flatnonzero(reading.labels == top).tolist() if most > ONE_SIDED * len(rows) else []
    return [
        *finding(
            "one label dominates", "warning", "train", [rows[place].id for place in one_sided], table,
            "A model that always gives this label scores as high: compare with that baseline.",
        ),
        *finding(
            "label never seen", "warning", "train", never, table, "No training row has this answer, so it cannot be learnt."
        ),
    ]  # fmt: skip
