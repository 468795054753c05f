"""A task's rows read, split and rendered, once: what comes out is kept on disk under a digest of what went in."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from luthier.cached import cached, code_digest, digest, installed
from luthier.data.formats.chat import read_conversation
from luthier.data.formats.superni import TokenCounter
from luthier.data.rows import Row
from luthier.data.source import Source, iterate_rows, source_digest
from luthier.data.stored import ExampleFile, StoredExamples, packed
from luthier.data.streams import RowStream
from luthier.data.task import SPLITS, Example, Examples, Split, Task
from luthier.data.templates import NamedTemplate, chosen_templates
from luthier.data.worker import RenderWorker
from luthier.errors import UserError
from luthier.workers import ordered_map, processors

CHUNK = 1000
# Fewer rows than this are rendered here: starting workers takes a second.
FEW = 20 * CHUNK
# What of a task does not change its examples.
_UNSEEN = ("name", "metrics", "max_new_tokens", "chain_of_thought", "inverted", "train", "validation", "test")

Asked = tuple[Split, Row]
# A line to store, or the row that was skipped; whether its completion is empty.
Answer = tuple[Split, bytes, str, bool]


def load_examples(
    task: Task,
    folder: Path,
    seed: int,
    workers: int | None = None,
    counter: Callable[[], TokenCounter] | None = None,
    train_only: bool = False,
) -> Examples:
    """Read, split and render a task, or open what an earlier call rendered of the same content.

    Many rows are rendered by `workers` processes, by default one a core. `counter` gives the base's tokens to templates
    that fit a prompt into a limit. `train_only` leaves the held-out rows unread. Raises UserError for unreadable rows, a split without rows and a split whose
    targets are all empty.
    """
    templates = chosen_templates(task, folder)
    tokens = counter() if counter and any(one.counts for one in templates) else None
    given = {split: getattr(task, split) for split in SPLITS}
    key = digest(
        {
            "code": [code_digest("luthier.data"), installed("jinja2")],
            "seed": seed,
            "train only": train_only,
            "settings": {name: value for name, value in asdict(task).items() if name not in _UNSEEN},
            "templates": [one.identity() for one in templates],
            "tokens": tokens.identity() if tokens else None,
            "splits": {
                split: source_digest(one, folder) if isinstance(one, Source) else one for split, one in given.items()
            },
        }
    )
    made = cached(
        "examples", key, lambda place: _render_all(Renderer(task, folder, seed, tokens), workers, place, train_only)
    )
    index = json.loads((made / "index.json").read_text())
    stored = {split: StoredExamples(made, split, index["rows"][split]) for split in SPLITS}
    stream = RenderedStream(task, folder, seed, tokens) if task.train and task.train.stream else None
    return Examples(**stored, skipped=index["skipped"], stream=stream)


def _render_all(renderer: "Renderer", workers: int | None, place: Path, train_only: bool) -> None:
    task = renderer.task
    files = {split: ExampleFile(place, split) for split in SPLITS}
    filled: Counter[str] = Counter()
    first: dict[str, str] = {}
    skipped: list[str] = []
    try:
        for answers in _rendered(renderer, _chunks(_asked(task, renderer.folder, renderer.seed, train_only)), workers):
            for split, line, name, empty in answers:
                if not line:
                    skipped.append(name)
                    continue
                files[split].add(line)
                filled[split] += not empty
                first.setdefault(split, name)
    finally:
        renderer.close()
        for file in files.values():
            file.close()
    for split, file in files.items():
        if file.count and not filled[split]:
            raise UserError(
                f"All {file.count} targets of the {split} split of task {task.name!r} are empty "
                f"(first row: {first[split]}). Check the part of the template after '|||'."
            )
    counts = {split: file.count for split, file in files.items()}
    (place / "index.json").write_text(json.dumps({"rows": counts, "skipped": skipped}))


def _rendered(renderer: "Renderer", chunks: Iterator[list[Asked]], workers: int | None) -> Iterator[list[Answer]]:
    """Here while rows are few, in processes of their own once they are many."""
    few = list(islice(chunks, FEW // CHUNK))
    more = next(chunks, None)
    if more is None or (workers or processors()) == 1:
        yield from map(renderer, few)
        if more is not None:
            yield renderer(more)
            yield from map(renderer, chunks)
        return

    def every() -> Iterator[list[Asked]]:
        yield from few
        yield more
        yield from chunks

    yield from ordered_map(renderer, every(), workers)


def _chunks(rows: Iterable[Asked]) -> Iterator[list[Asked]]:
    several = iter(rows)
    while chunk := list(islice(several, CHUNK)):
        yield chunk


def _asked(task: Task, folder: Path, seed: int, train_only: bool) -> Iterator[Asked]:
    """Every row with its split: those of the training file first, in its order."""
    if task.train and task.train.stream:
        yield from (("train", row) for row in RowStream(task.train, folder, seed).sample())
    elif task.train:
        assigned = _assignment(task, folder, seed)
        for number, row in enumerate(iterate_rows(task.train, folder)):
            split = SPLITS[assigned[number]] if assigned else "train"
            if split == "train" or not train_only:
                yield split, row
    for split in () if train_only else SPLITS[1:]:
        if isinstance(given := getattr(task, split), Source):
            for row in iterate_rows(given, folder):
                yield split, row


def _assignment(task: Task, folder: Path, seed: int) -> bytearray | None:
    """The split of each row of the training file, as a place in SPLITS; None where all are for training."""
    shares = [(split, given) for split in SPLITS[1:] if not isinstance(given := getattr(task, split), Source) and given]
    if not shares or task.train is None:
        return None
    labels = [_label(row, task.stratify) for row in iterate_rows(task.train, folder)]
    total = len(labels)
    pool = list(range(total))
    random.Random(f"split {seed}").shuffle(pool)
    if task.stratify:
        pool = _evenly(pool, labels)
    assigned, start = bytearray(total), 0
    for split, share in shares:
        size = round(share * total) if share < 1 else int(share)
        if total and not size:
            raise UserError(
                f"A share of {share} of {total} training rows leaves no {split} rows for task {task.name!r}. "
                f"Set `{split}` to a file, a number of rows or a larger share."
            )
        for place in pool[start : start + size]:
            assigned[place] = SPLITS.index(split)
        start += size
    if total and start >= total:
        raise UserError(
            f"The validation and test splits take all {total} rows of {task.name!r}: no row is left to train on."
        )
    return assigned


def _label(row: Row, column: str | None) -> str:
    if column is None:
        return ""
    if column not in row.values:
        raise UserError(
            f"{row.id} has no column {column!r} (asked for by `stratify`). It has: {', '.join(map(str, row.values))}."
        )
    return str(row.values[column])


def _evenly(pool: Sequence[int], labels: Sequence[str]) -> list[int]:
    """The rows so ordered that every stretch holds each label in its proportion."""
    counts = Counter(labels)
    seen: Counter[str] = Counter()
    places = []
    for row in pool:
        places.append((seen[labels[row]] + 0.5) / counts[labels[row]])
        seen[labels[row]] += 1
    return [pool[place] for place in sorted(range(len(pool)), key=lambda place: places[place])]


class Renderer:
    """Renders rows; what it holds can be sent to a worker process."""

    def __init__(self, task: Task, folder: Path, seed: int, tokens: TokenCounter | None):
        self.task, self.folder, self.seed, self.tokens = task, folder, seed, tokens
        self._templates: list[NamedTemplate] | None = None
        self._worker = RenderWorker()

    def __getstate__(self) -> tuple[Any, ...]:
        return self.task, self.folder, self.seed, self.tokens

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __call__(self, rows: Sequence[Asked]) -> list[Answer]:
        """The lines of these rows: one a row, or one a row and template."""
        return [
            (split, packed(one), one.id, not one.completion) if isinstance(one, Example) else (split, b"", one, True)
            for split, row in rows
            for one in self.examples(split, row)
        ]

    def close(self) -> None:
        """Stop the process in which templates from outside are rendered."""
        self._worker.close()

    def examples(self, split: Split, row: Row) -> Iterator[Example | str]:
        """The examples of a row; a name where a template does not apply to it."""
        task = self.task
        references = task.references if split == "test" else []
        if task.format:
            yield _conversation(task, row, references)
            return
        if self._templates is None:
            self._templates = chosen_templates(task, self.folder)
        chosen = self._templates
        if len(chosen) > 1 and (split != "train" or task.template_choice == "seeded"):
            chosen = [random.Random(f"template {self.seed} {row.id}").choice(chosen)]
        for template in chosen:
            own = [column for column in template.references if column in row.values] if split == "test" else []
            example = self._render(template, row, references or own)
            yield example or f"{row.id} ({template.name})"

    def _render(self, template: NamedTemplate, row: Row, references: list[str]) -> Example | None:
        """One example; None where a template from outside gives no prompt or no completion for this row."""
        parts, choices = template.render(row.values, row.id, self.seed, self._worker, self.tokens)
        if template.outside and (len(parts) < 2 or not parts[0]):
            return None
        if len(parts) == 1:
            raise UserError(
                f"{row.id}: the template has no completion. Write `prompt ||| completion`, for example "
                "`Summarise: {{ dialogue }} ||| {{ summary }}`."
            )
        if len(parts) > 2:
            raise UserError(
                f"{row.id}: the template renders to {len(parts)} parts; one '|||' between prompt and completion is allowed."
            )
        prompt, completion = parts
        blank = [name for name in template.columns() if not str(row.values.get(name) or "").strip()]
        blank = [name for name in blank if name in row.values and not isinstance(row.values[name], (int, float, list))]
        null = [name for name in blank if row.values[name] is None and "None" in f"{prompt} {completion}"]
        return Example(
            id=row.id,
            prompt=prompt,
            completion=completion,
            references=_references(row, references) or (completion,),
            choices=choices,
            system=self.task.system,
            frame=template.frame(row.values, row.id),
            blank=tuple(blank),
            null=tuple(null),
        )


class RenderedStream:
    """The examples of a streamed training file."""

    def __init__(self, task: Task, folder: Path, seed: int, tokens: TokenCounter | None):
        assert task.train is not None
        self._rows = RowStream(task.train, folder, seed)
        self._renderer = Renderer(task, folder, seed, tokens)

    def order(self, turn: int) -> list[int]:
        """The shards in the order of one pass over them."""
        return self._rows.order(turn)

    def shard(self, turn: int, shard: int) -> Iterator[Example]:
        """The examples of one shard in the order of one pass, without rows to which no template applies."""
        for row in self._rows.shard(turn, shard):
            yield from (one for one in self._renderer.examples("train", row) if isinstance(one, Example))


def _references(row: Row, columns: list[str]) -> tuple[str, ...]:
    missing = [column for column in columns if column not in row.values]
    if missing:
        raise UserError(
            f"{row.id} has no column {missing[0]!r} (asked for by `references`). It has: {', '.join(map(str, row.values))}."
        )
    given = [row.values[column] for column in columns]
    return tuple(str(text) for one in given for text in (one if isinstance(one, (list, tuple)) else [one]))


def _conversation(task: Task, row: Row, references: list[str]) -> Example:
    """A chat log as its last exchange behind the earlier ones."""
    assert task.format is not None
    found = read_conversation(row.values, task.format, row.id)
    *earlier, (prompt, completion) = found.exchanges
    return Example(
        id=row.id,
        prompt=prompt,
        completion=completion,
        references=_references(row, references) or (completion,),
        system=found.system or task.system,
        shots=tuple(earlier),
        learnt=len(earlier),
    )
