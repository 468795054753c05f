"""Audit: what is wrong with the rows, by id, before anything is trained. Text only; tokens are `encoding.audit`'s.

An error stops a run; a warning goes into its report. Every check names the rows it found, and is silent on sound data.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from statistics import median
from typing import Literal

from luthier.data.task import SPLITS, Example, Examples

# Near duplicates: this share of a row's word sequences stands in one row of the training split.
SHINGLE, NEAR = 6, 0.8
# Word sequences in more than this share of the rows are the template's, not the rows'.
BOILERPLATE = 0.2
# A length is extreme at this multiple of the median, and only where it is also long in itself.
EXTREME, EXTREME_CHARACTERS = 20, 2000
ONE_SIDED = 0.95

# UTF-8 read as Latin-1, replacement signs, and control characters but tab and line ends.
_BROKEN = re.compile(r"\ufffd|[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Finding:
    """One kind of defect in one split: how many rows, which, an example, and what to do."""

    kind: str
    level: Literal["error", "warning"]
    split: str
    count: int
    rows: tuple[str, ...]
    example: str
    advice: str


def finding(
    kind: str, level: Literal["error", "warning"], split: str, rows: Sequence[str], example: str, advice: str
) -> list[Finding]:
    """A finding where there are rows, else nothing."""
    if not rows:
        return []
    shown = example if len(example) <= 200 else example[:197] + "..."
    return [Finding(kind, level, split, len(rows), tuple(rows), shown, advice)]


def audit_text(examples: Examples) -> list[Finding]:
    """All findings that need no tokenizer."""
    found: list[Finding] = []
    for split in SPLITS:
        found += _empty(getattr(examples, split), split)
        found += _choices(getattr(examples, split), split)
        found += _encoding(getattr(examples, split), split)
    found += _repeated(examples.train)
    found += _lengths(examples.train)
    found += _balance(examples.train)
    found += _leaks(examples)
    return found


def _empty(rows: Sequence[Example], split: str) -> list[Finding]:
    return [
        *finding(
            "no target", "error", split, [row.id for row in rows if _unanswered(row)],
            next((row.prompt for row in rows if _unanswered(row)), ""),
            "There is nothing to learn: after '|||' the template renders nothing, or an answer of the chat is empty.",
        ),
        *finding(
            "no prompt", "error", split, [row.id for row in rows if not row.prompt],
            next((row.completion for row in rows if not row.prompt), ""),
            "The template renders nothing before '|||' for these rows: fill or remove them.",
        ),
        *finding(
            "empty reference", "error", split,
            [row.id for row in rows if row.completion and not all(one.strip() for one in row.references)],
            "", "A row without a human answer cannot be scored: fill the column named in `references`.",
        ),
    ]  # fmt: skip


def _unanswered(row: Example) -> bool:
    learnt = row.shots[len(row.shots) - row.learnt :]
    return not row.completion or not all(answer for _, answer in learnt)


def _choices(rows: Sequence[Example], split: str) -> list[Finding]:
    wrong = [row for row in rows if row.choices and row.completion and row.completion not in row.choices]
    first = f"{wrong[0].completion!r}, choices: {', '.join(wrong[0].choices)}" if wrong else ""
    return finding(
        "answer not among the choices", "error", split, [row.id for row in wrong], first,
        "Correct the answer or `choices`: such a row can never be answered right.",
    )  # fmt: skip


def _encoding(rows: Sequence[Example], split: str) -> list[Finding]:
    broken = [row for row in rows if _BROKEN.search(row.prompt) or _BROKEN.search(row.completion)]
    example = ""
    if broken:
        text = broken[0].prompt + "\n" + broken[0].completion
        match = _BROKEN.search(text)
        assert match is not None
        example = repr(text[max(0, match.start() - 20) : match.end() + 20])
    return finding(
        "suspicious encoding", "warning", split, [row.id for row in broken], example,
        "Bytes were read in another encoding, or control characters are left: save the file as UTF-8.",
    )  # fmt: skip


def _repeated(rows: Sequence[Example]) -> list[Finding]:
    groups: dict[str, list[Example]] = defaultdict(list)
    for row in rows:
        groups[_plain(row.prompt)].append(row)
    same, unlike = [], []
    for group in groups.values():
        answers = Counter(_plain(row.completion) for row in group)
        same += [row for row in group[1:] if answers[_plain(row.completion)] == len(group)]
        unlike += group if len(answers) > 1 else []
    return [
        *finding(
            "duplicate", "warning", "train", [row.id for row in same], same[0].prompt if same else "",
            "The same prompt and answer stand more than once: they count that many times in the loss.",
        ),
        *finding(
            "one prompt, several answers", "warning", "train", [row.id for row in unlike], unlike[0].prompt if unlike else "",
            "The same prompt has different answers: no model can give both.",
        ),
    ]  # fmt: skip


def _lengths(rows: Sequence[Example]) -> list[Finding]:
    if len(rows) < 10:
        return []
    usual = max(1.0, median(len(row.completion) for row in rows))
    long = [row for row in rows if len(row.completion) > max(EXTREME * usual, EXTREME_CHARACTERS)]
    return finding(
        "extreme length", "warning", "train", [row.id for row in long], long[0].completion if long else "",
        f"The answer is over {EXTREME} times as long as usual ({usual:.0f} characters): is it one answer?",
    )  # fmt: skip


def _balance(rows: Sequence[Example]) -> list[Finding]:
    fixed = {row.choices for row in rows if row.choices}
    if len(fixed) != 1 or len(rows) < 20:  # choices of their own for each row have no balance
        return []
    choices = next(iter(fixed))
    counts = Counter(row.completion for row in rows)
    never = [choice for choice in choices if not counts[choice]]
    top, most = counts.most_common(1)[0]
    table = ", ".join(f"{choice}: {counts[choice]}" for choice in choices)
    one_sided = [row.id for row in rows if row.completion == top] if most > ONE_SIDED * len(rows) else []
    return [
        *finding(
            "one label dominates", "warning", "train", one_sided, table,
            "A model that always gives this label scores as high: compare with that baseline.",
        ),
        *finding(
            "label never seen", "warning", "train", never, table, "No training row has this answer, so it cannot be learnt."
        ),
    ]  # fmt: skip


def _leaks(examples: Examples) -> list[Finding]:
    """Exact and near duplicates of held-out rows in the training split."""
    found: list[Finding] = []
    seen: dict[str, str] = {}
    for row in examples.train:
        seen.setdefault(_plain(row.prompt), row.id)
    for split in ("validation", "test"):
        rows: list[Example] = getattr(examples, split)
        exact = [(row, seen[_plain(row.prompt)]) for row in rows if _plain(row.prompt) in seen]
        found += finding(
            "also in training", "error", split, [row.id for row, _ in exact],
            f"{exact[0][0].id} = {exact[0][1]}: {exact[0][0].prompt}" if exact else "",
            "The score would measure memory: remove these rows from training.",
        )  # fmt: skip
        taken = {row.id for row, _ in exact}
        near = _near([row for row in rows if row.id not in taken], examples.train)
        found += finding(
            "nearly in training", "warning", split, [held for held, _ in near],
            f"{near[0][0]} ~ {near[0][1]}" if near else "",
            f"At least {NEAR:.0%} of the row's word sequences stand in one training row.",
        )  # fmt: skip
    return found


def audit_across(tasks: Sequence[tuple[str, Examples]]) -> list[Finding]:
    """Held-out rows of a mixture's task whose prompt stands in the training split of another."""
    seen: dict[bytes, tuple[str, str]] = {}
    for name, examples in tasks:
        for row in examples.train:
            seen.setdefault(_mark(row.prompt), (name, row.id))
    found: list[Finding] = []
    for name, examples in tasks:
        for split in SPLITS[1:]:
            shared = [
                (row, other)
                for row in getattr(examples, split)
                if (other := seen.get(_mark(row.prompt))) and other[0] != name
            ]
            found += finding(
                "in another task's training", "error", f"{name} {split}", [row.id for row, _ in shared],
                f"{shared[0][0].id} = {' '.join(shared[0][1])}: {shared[0][0].prompt}" if shared else "",
                "The score would measure memory: the mixture trains on this prompt under another task's name.",
            )  # fmt: skip
    return found


def _mark(text: str) -> bytes:
    return blake2b(_plain(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _near(held: Sequence[Example], train: Sequence[Example]) -> list[tuple[str, str]]:
    shingles = {row.id: _shingles(row.prompt) for row in held}
    often = Counter(one for each in shingles.values() for one in each)
    limit = max(2, BOILERPLATE * len(held))
    own = {name: {one for one in each if often[one] <= limit} for name, each in shingles.items()}
    where: dict[int, list[str]] = defaultdict(list)
    for name, each in own.items():
        for one in each:
            where[one].append(name)
    best: dict[str, tuple[int, str]] = {}
    for row in train:
        shared = Counter(name for one in _shingles(row.prompt) for name in where.get(one, ()))
        for name, count in shared.items():
            if count > best.get(name, (0, ""))[0]:
                best[name] = (count, row.id)
    return [
        (name, best[name][1])
        for name in own
        if len(own[name]) >= SHINGLE and name in best and best[name][0] >= NEAR * len(own[name])
    ]


def _shingles(text: str) -> set[int]:
    words = _plain(text).split()
    return {hash(tuple(words[start : start + SHINGLE])) for start in range(len(words) - SHINGLE + 1)}


def _plain(text: str) -> str:
    """Case, accents' encoding, punctuation and spacing do not make a row another."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded.strip()


def errors(found: Iterable[Finding]) -> list[Finding]:
    """Those that stop a run."""
    return [one for one in found if one.level == "error"]
