"""Task: rows + template + metrics + splits; and what an example of it is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BeforeValidator, Discriminator, Tag

from luthier.data.formats.chat import Format
from luthier.data.source import Source

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
    `system`. `template` is Jinja text (``prompt ||| completion``), ``promptsource:FOLDER/name``, ``flan:FILE/task``,
    ``tk-instruct:def+pos2`` (for Super-NaturalInstructions), a path to a templates.yaml, or a
    list of these. With several, each row takes one by seed, or training rows take each (`template_choice: all`), or all rows take the
    one of a number from 1 (`template_choice: 2`).
    A split is a file (`path`, or `{path, columns, limit}`) or, for validation and test, a share
    (0.1) or a number (50) of the training rows, drawn once with the recipe's seed, each value of the column
    `stratify` in its proportion. `references`
    names columns of the test rows that hold the human answers; without it the completion is the reference.
    `metrics` names what judges it (docs/metrics.md), the main one last.
    `choices` (a list, or Jinja with ``|||``) makes it a classification: the model's most probable
    choice is its answer. `chain_of_thought` is a second template, with the reasons before the answer, and `inverted` one
    from the answer back to the question, for mixtures that ask for these forms.
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
    inverted: str | None = None
    stratify: str | None = None
    template_choice: Literal["seeded", "all"] | int = "seeded"
    references: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if (self.template is None) == (self.format is None):
            raise ValueError(
                "a task needs a `template` (prompt ||| completion), or a `format` for chat logs (messages, sharegpt, alpaca)"
                + (", not both" if self.template is not None else "")
            )
        if self.format and (self.choices or self.chain_of_thought or self.inverted):
            raise ValueError(
                f"`choices`, `chain_of_thought` and `inverted` need a template; the format is {self.format}"
            )
        for name, split in (("validation", self.validation), ("test", self.test)):
            if isinstance(split, Source) and split.stream:
                raise ValueError(f"`stream` is for training rows; the {name} split is scored again and again")
            if self.train and self.train.stream and not isinstance(split, Source) and split:
                raise ValueError(
                    f"the training rows are streamed, so {name} cannot be split off them: name a file, or 0"
                )
            if not isinstance(split, Source) and split < 0:
                raise ValueError(f"a split of {split} rows or share is negative")
        if isinstance(self.template_choice, int) and self.template_choice < 1:
            raise ValueError(f"template_choice is {self.template_choice}; templates are counted from 1")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")

    @property
    def fixed_choices(self) -> list[str]:
        """The answer choices, where they are the same for every row."""
        if isinstance(self.choices, str):
            return [] if "{" in self.choices else [one.strip() for one in self.choices.split("|||")]
        return [one for one in self.choices or [] if "{" not in one]

    @property
    def judged_by(self) -> list[str]:
        """The metrics by name; ROUGE for free text and accuracy for choices unless the task says."""
        return self.metrics or (["accuracy"] if self.choices else ["rouge1", "rouge2", "rougeL", "rougeLsum"])


@dataclass(frozen=True)
class Frame:
    """What FLAN's few-shot form puts around a row: an exemplar is opening + prompt + asking + completion.

    Exemplars and the question, which ends after `asking`, are joined by `separator` between `before` and `after`.
    """

    opening: str
    asking: str
    before: str
    after: str
    separator: str


@dataclass(frozen=True)
class Example:
    """A rendered prompt/completion pair; `shots` are pairs shown inside the prompt.

    The last `learnt` shots are the conversation's own earlier exchanges, whose answers are trained on too. `frame` is
    there where the row's template has a few-shot form of its own.
    """

    id: str
    prompt: str
    completion: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    system: str | None = None
    shots: tuple[tuple[str, str], ...] = ()
    learnt: int = 0
    frame: Frame | None = None
    blank: tuple[str, ...] = ()  # columns that the template uses and this row leaves empty
    null: tuple[str, ...] = ()  # those of them for which the template wrote "None"


@dataclass(frozen=True)
class Examples:
    """A task's examples by split, in memory or on disk; `skipped` names rows to which a template from outside does not apply.

    Where training rows are streamed, `stream` gives them and `train` holds a sample, the first of them.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    skipped: list[str] = field(default_factory=list)
    stream: "ExampleStream | None" = None


class ExampleStream(Protocol):
    """Rendered training rows, read while they are trained on."""

    def order(self, turn: int) -> list[int]:
        """The shards in the order of one pass over them."""

    def shard(self, turn: int, shard: int) -> Iterator[Example]:
        """The examples of one shard in the order of one pass, from the start."""
