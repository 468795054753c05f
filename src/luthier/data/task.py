"""Task: rows + template + metrics + splits; and the examples it yields."""

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Tag

from luthier.data.formats.chat import Format, read_conversation
from luthier.data.rows import Row
from luthier.data.source import Source, read_rows
from luthier.data.templates import NamedTemplate, resolve_templates
from luthier.data.worker import RenderWorker
from luthier.errors import UserError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def _as_source(given: Any) -> Any:
    return {"path": given} if isinstance(given, str) else given


def _kind(given: Any) -> str:
    return "file" if isinstance(given, (str, dict, Source)) else "share"


# In a recipe a file may be written as its path alone.
File = Annotated[Source, BeforeValidator(_as_source)]
FileOrShare = Annotated[Annotated[File, Tag("file")] | Annotated[float, Tag("share")], Discriminator(_kind)]


@dataclass(frozen=True)
class Task:
    """What to learn and how to judge it.

    `format` reads chat logs instead: every answer of a conversation is learnt, a row's own system prompt goes before
    `system`. `template` is Jinja text (``prompt ||| completion``), ``promptsource:FOLDER/name``, ``flan:FILE/task``, a path to a templates.yaml, or a
    list of these. With several, each row takes one by seed, or training rows take each (`template_choice: all`).
    A split is a file (`path`, or `{path, columns, limit}`) or, for validation and test, a share
    (0.1) or a number (50) of the training rows, drawn once with the recipe's seed, each value of the column
    `stratify` in its proportion. `references`
    names columns of the test rows that hold the human answers; without it the completion is the reference.
    `choices` (a list, or Jinja with ``|||``) makes it a classification: the model's most probable
    choice is its answer. `chain_of_thought` is a second template, with the reasons before the answer, for mixtures
    that ask for that form.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    template: str | list[str] | None = None
    train: File | None = None
    validation: FileOrShare = 0.1
    test: FileOrShare = 0.1
    name: str = "task"
    system: str | None = None
    format: Format | None = None
    choices: str | list[str] | None = None
    chain_of_thought: str | None = None
    stratify: str | None = None
    template_choice: Literal["seeded", "all"] = "seeded"
    references: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if (self.template is None) == (self.format is None):
            raise ValueError(
                "a task needs a `template` (prompt ||| completion), or a `format` for chat logs (messages, sharegpt, alpaca)"
                + (", not both" if self.template is not None else "")
            )
        if self.format and (self.choices or self.chain_of_thought):
            raise ValueError(f"`choices` and `chain_of_thought` need a template; the format is {self.format}")
        for split in (self.validation, self.test):
            if not isinstance(split, Source) and split < 0:
                raise ValueError(f"a split of {split} rows or share is negative")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")

    @property
    def judged_by(self) -> list[str]:
        """The metrics by name; ROUGE for free text and accuracy for choices unless the task says."""
        return self.metrics or (["accuracy"] if self.choices else ["rouge1", "rouge2", "rougeL", "rougeLsum"])


@dataclass(frozen=True)
class Example:
    """A rendered prompt/completion pair; `shots` are pairs shown inside the prompt.

    The last `learnt` shots are the conversation's own earlier exchanges, whose answers are trained on too.
    """

    id: str
    prompt: str
    completion: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    system: str | None = None
    shots: tuple[tuple[str, str], ...] = ()
    learnt: int = 0


@dataclass(frozen=True)
class Examples:
    """A task's examples by split; `skipped` names rows to which a template from outside does not apply."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    skipped: list[str] = field(default_factory=list)


def load_examples(task: Task, folder: Path, seed: int) -> Examples:
    """Read, split and render a task.

    Raises UserError for unreadable rows, a split without rows and a split whose targets are all empty.
    """
    templates = resolve_templates(task.template, task.choices, folder) if task.template is not None else []
    rows = _split_rows(task, folder, seed)
    examples: dict[str, list[Example]] = {split: [] for split in SPLITS}
    skipped: list[str] = []
    with RenderWorker() as worker:
        for split in SPLITS:
            references = task.references if split == "test" else []
            for row in rows[split]:
                if task.format:
                    examples[split].append(_conversation(task, row, references))
                    continue
                chosen = templates
                if len(templates) > 1 and (split != "train" or task.template_choice == "seeded"):
                    chosen = [random.Random(f"template {seed} {row.id}").choice(templates)]
                for template in chosen:
                    example = _render(task, template, row, references, seed, worker)
                    if example is None:
                        skipped.append(f"{row.id} ({template.name})")
                    else:
                        examples[split].append(example)
    for split in SPLITS:
        if examples[split] and not any(example.completion for example in examples[split]):
            raise UserError(
                f"All {len(examples[split])} targets of the {split} split of task {task.name!r} are empty "
                f"(first row: {examples[split][0].id}). Check the part of the template after '|||'."
            )
    return Examples(**examples, skipped=skipped)


def _split_rows(task: Task, folder: Path, seed: int) -> dict[Split, list[Row]]:
    rows: dict[Split, list[Row]] = {"train": read_rows(task.train, folder) if task.train else []}
    shares: list[tuple[Split, float]] = []
    for split, given in (("validation", task.validation), ("test", task.test)):
        if isinstance(given, Source):
            rows[split] = read_rows(given, folder)  # type: ignore[index]
        else:
            shares.append((split, given))  # type: ignore[arg-type]
    pool, total = list(rows["train"]), len(rows["train"])
    if shares:
        random.Random(f"split {seed}").shuffle(pool)
        if task.stratify:
            pool = _evenly(pool, task.stratify)
    for split, share in shares:
        size = round(share * total) if share < 1 else int(share)
        if share and total and not size:
            raise UserError(
                f"A share of {share} of {total} training rows leaves no {split} rows for task {task.name!r}. "
                f"Set `{split}` to a file, a number of rows or a larger share."
            )
        rows[split], pool = pool[:size], pool[size:]
    if shares:
        kept = {id(row) for row in pool}
        rows["train"] = [row for row in rows["train"] if id(row) in kept]
        if total and not rows["train"]:
            raise UserError(
                f"The validation and test splits take all {total} rows of {task.name!r}: no row is left to train on."
            )
    return rows


def _evenly(rows: list[Row], column: str) -> list[Row]:
    """The rows so ordered that every stretch holds each value of the column in its proportion."""
    for row in rows:
        if column not in row.values:
            raise UserError(
                f"{row.id} has no column {column!r} (asked for by `stratify`). It has: {', '.join(map(str, row.values))}."
            )
    counts = Counter(str(row.values[column]) for row in rows)
    seen: Counter[str] = Counter()
    places = []
    for row in rows:
        value = str(row.values[column])
        places.append((seen[value] + 0.5) / counts[value])
        seen[value] += 1
    return [rows[place] for place in sorted(range(len(rows)), key=lambda place: places[place])]


def _render(
    task: Task, template: NamedTemplate, row: Row, references: list[str], seed: int, worker: RenderWorker
) -> Example | None:
    """One example; None where a template from outside gives no prompt or no completion for this row."""
    parts, choices = template.render(row.values, row.id, seed, worker)
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
    return Example(
        id=row.id,
        prompt=prompt,
        completion=completion,
        references=_references(row, references) or (completion,),
        choices=choices,
        system=task.system,
    )


def _references(row: Row, columns: list[str]) -> tuple[str, ...]:
    missing = [column for column in columns if column not in row.values]
    if missing:
        raise UserError(
            f"{row.id} has no column {missing[0]!r} (asked for by `references`). It has: {', '.join(map(str, row.values))}."
        )
    return tuple(str(row.values[column]) for column in columns)


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
