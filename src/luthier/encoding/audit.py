"""The audit of a task: its text and its tokens in one pass over the rows, by worker processes where they are many."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from luthier.cached import cached, code_digest, digest
from luthier.data.audit import (
    KINDS,
    Defect,
    Reading,
    joined,
    kept_sequences,
    read_text,
    row_findings,
    training_findings,
)
from luthier.data.findings import Finding, Level
from luthier.data.leaks import HeldOut, Hit, Near, find_leaks, in_this_process
from luthier.data.stored import StoredExamples
from luthier.data.task import SPLITS, Example, Examples, Split
from luthier.encoding.encoder import Encoder
from luthier.errors import UserError
from luthier.workers import ordered_map, processors

CHUNK = 1000
# Fewer rows than this are read here: a worker takes seconds to load the tokenizer.
FEW = 20 * CHUNK

TOKEN_KINDS: dict[str, tuple[Level, str]] = {
    "no room for the prompt": (
        "error", "The answer alone fills {amount} tokens, all there are: raise max_length or shorten it; a target is never cut.",
    ),
    "special token in the answer": (
        "error", "The answer's text holds a token of the tokenizer's own, such as its end token: remove it from the data.",
    ),
    "doubled start token": (
        "error", "The template writes the start token that the tokenizer adds already: remove it from the template.",
    ),
    "special token in the prompt": (
        "warning", "The prompt's text holds a token of the tokenizer's own: the model reads it as structure, not as text.",
    ),
    "prompt cut": ("warning", "The prompt is too long and loses up to {amount} tokens of its middle: raise max_length."),
    "signs lost": (
        "warning", "The tokenizer does not know a sign of the answer and trains its unknown token instead.",
    ),
}  # fmt: skip


def audit_text(examples: Examples) -> list[Finding]:
    """All findings that need no tokenizer, leaks between the splits included."""
    readings = _read(None, examples)
    return [*_findings(examples, readings, KINDS), *find_leaks([("", examples)], [readings])[0]]


def audit_tokens(encoder: Encoder, examples: Examples) -> list[Finding]:
    """Findings about the token ids that training and scoring will use."""
    readings = _read(encoder, examples)
    found = [row_findings(getattr(examples, split), readings[split], split, TOKEN_KINDS) for split in SPLITS]
    return [one for each in found for one in each]


def audit_tasks(encoder: Encoder, tasks: Sequence[tuple[str, Examples]]) -> list[list[Finding]]:
    """All findings of each task, with leaks from one into another.

    What comes out is kept in the cache under a digest of the rows and the tokenizer, so that sound data are read once.
    """
    keys = [_key(encoder, examples) for _, examples in tasks]
    folders = [_audited(encoder, examples, key) for (_, examples), key in zip(tasks, keys, strict=True)]
    own = [list(map(_finding, json.loads((folder / "found.json").read_text()))) for folder in folders]
    whole = digest([keys, [name for name, _ in tasks]])
    place = cached("leaks", whole, lambda place: _find_leaks(tasks, folders, place))
    leaks = json.loads((place / "found.json").read_text())
    return [[*found, *map(_finding, each)] for found, each in zip(own, leaks, strict=True)]


def _key(encoder: Encoder, examples: Examples) -> str:
    named = [one.key for split in SPLITS if isinstance(one := getattr(examples, split), StoredExamples)]
    assert len(named) == len(SPLITS), "only stored examples have a key"
    return digest([code_digest("luthier.data", "luthier.encoding"), named, encoder.identity()])


def _audited(encoder: Encoder, examples: Examples, key: str) -> Path:
    """A folder with the findings of one task by itself, and what the search for leaks needs of its rows."""

    def make(place: Path) -> None:
        readings = _read(encoder, examples)
        found = _findings(examples, readings, KINDS | TOKEN_KINDS)
        (place / "found.json").write_text(json.dumps([asdict(one) for one in found]))
        _keep(readings, place)

    return cached("audits", key, make)


def _find_leaks(tasks: Sequence[tuple[str, Examples]], folders: Sequence[Path], place: Path) -> None:
    def search(train: Sequence[Example], held: HeldOut) -> Iterable[list[Hit]]:
        if len(train) <= FEW or processors() == 1:
            return in_this_process(train, held)
        held.save(place)
        return ordered_map(Near(train, place), _stretches(len(train)))

    found = find_leaks(tasks, [_kept(folder) for folder in folders], search)
    for file in place.glob("held-*.npy"):
        file.unlink()
    (place / "found.json").write_text(json.dumps([[asdict(one) for one in each] for each in found]))


def _keep(readings: dict[Split, Reading], folder: Path) -> None:
    arrays: dict[str, Any] = {}
    for split, reading in readings.items():
        arrays[f"{split}-prompts"] = reading.prompts
        if split != "train":
            arrays[f"{split}-sizes"] = np.array(list(map(len, reading.shingles)), np.int64)
            arrays[f"{split}-shingles"] = np.concatenate([np.empty(0, np.uint64), *reading.shingles])
    np.savez(folder / "marks.npz", **arrays)


def _kept(folder: Path) -> dict[Split, Reading]:
    readings: dict[Split, Reading] = {}
    with np.load(folder / "marks.npz") as arrays:
        for split in SPLITS:
            readings[split] = Reading(prompts=arrays[f"{split}-prompts"])
            if split != "train":
                ends = np.cumsum(arrays[f"{split}-sizes"])
                readings[split].shingles = np.split(arrays[f"{split}-shingles"], ends[:-1]) if len(ends) else []
    return readings


def _findings(examples: Examples, readings: dict[Split, Reading], kinds: dict[str, tuple[Level, str]]) -> list[Finding]:
    found: list[Finding] = []
    for split in SPLITS:
        found += row_findings(getattr(examples, split), readings[split], split, kinds)
    return [*found, *training_findings(examples.train, readings["train"])]


def _finding(values: dict[str, Any]) -> Finding:
    return Finding(**{**values, "rows": tuple(values["rows"])})


def _read(encoder: Encoder | None, examples: Examples) -> dict[Split, Reading]:
    readings: dict[Split, Reading] = {}
    for split in SPLITS:
        rows: Sequence[Example] = getattr(examples, split)
        job = ReadStretch(encoder, rows, 0 if split == "train" else kept_sequences(len(rows)))
        many = len(rows) > FEW and processors() > 1 and encoder is not None
        each: Iterator[Reading] = ordered_map(job, _stretches(len(rows))) if many else map(job, _stretches(len(rows)))
        readings[split] = joined(list(each))
    return readings


def _stretches(rows: int) -> Iterator[range]:
    return (range(start, min(start + CHUNK, rows)) for start in range(0, rows, CHUNK))


class ReadStretch:
    """Reads a stretch of rows, text and tokens; it can be sent to a worker process."""

    def __init__(self, encoder: Encoder | None, rows: Sequence[Example], one_in: int):
        self.encoder, self.rows, self.one_in = encoder, rows, one_in

    def __call__(self, places: range) -> Reading:
        """What these rows leave behind."""
        found = read_text(self.rows, places, self.one_in)
        if self.encoder is not None:
            check = _token_check(self.encoder)
            for place in places:
                for defect in check(self.rows[place]):
                    found.note(place, defect)
        return found


def _token_check(encoder: Encoder) -> Callable[[Example], Iterator[Defect]]:
    """A function that tells the defects of a row's tokens."""
    tokenizer = encoder.tokenizer
    start, unknown = tokenizer.bos_token_id, tokenizer.unk_token_id
    special = set(tokenizer.all_special_ids) - {unknown}
    frames: dict[tuple[str | None, int], int] = {}

    def own(text: str) -> set[int]:
        """The tokenizer's own tokens: the unknown one only where it is written out, else it stands for lost signs."""
        return special | {unknown} if unknown is not None and str(tokenizer.unk_token) in text else special

    def count(ids: Sequence[int], among: set[int]) -> int:
        return len([one for one in ids if one in among])

    def frame(row: Example) -> int:
        """Special tokens that the encoder itself puts around a row of this shape."""
        shape = (row.system, len(row.shots))
        if shape not in frames:
            plain = Example("", "a", "", system=row.system and "a", shots=(("a", "a"),) * len(row.shots))
            frames[shape] = count(encoder.prompt_ids(plain), special)
        return frames[shape]

    def check(row: Example) -> Iterator[Defect]:
        if not row.completion or not row.prompt:
            return  # said already, by the audit of the text
        try:
            encoded = encoder.encode(row)
        except UserError:
            yield Defect("no room for the prompt", row.completion, encoder.max_length)
            return
        prompt = encoder.prompt_ids(row) if encoded.cut else encoded.prompt
        if encoded.cut:
            yield Defect("prompt cut", row.prompt, encoded.cut)
        answers = [answer for _, answer in row.shots[len(row.shots) - row.learnt :]] + [row.completion]
        wrong = [one for one in answers if own(one) & set(encoder.target_ids(one)[:-1])]
        if wrong:
            yield Defect("special token in the answer", wrong[0])
        elif count(prompt, own(encoder.prompt_text(row))) != frame(row):
            yield Defect("special token in the prompt", row.prompt)
        if start is not None and not encoder.chat and prompt[:2] == [start, start]:
            yield Defect("doubled start token", row.prompt)
        lost = [one for one in answers if unknown not in own(one) and unknown in encoder.target_ids(one)[:-1]]
        if unknown is not None and lost:
            yield Defect("signs lost", lost[0])

    return check
