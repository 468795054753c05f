"""Which templates a task names: Jinja text of its own, or templates of a promptsource file or collection."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luthier.data.formats.flan import FlanTemplate
from luthier.data.formats.flan_file import find_templates
from luthier.data.formats.promptsource import Entry, find_template, read_templates
from luthier.data.formats.superni import TkInstructTemplate, TokenCounter, read_form
from luthier.data.library import template_files
from luthier.data.task import Frame, Task
from luthier.data.template import SEPARATOR, Template
from luthier.data.worker import RenderWorker
from luthier.errors import UserError, nearest

PREFIX = "promptsource:"
FLAN = "flan:"
TK_INSTRUCT = "tk-instruct:"

AnyTemplate = Template | FlanTemplate | TkInstructTemplate


@dataclass(frozen=True)
class NamedTemplate:
    """A template and where it comes from: one of a file is rendered in a limited process of its own."""

    name: str
    template: AnyTemplate
    outside: bool

    def identity(self) -> list[Any]:
        """All that decides what it renders, as JSON can say it."""
        one = self.template
        if isinstance(one, Template):
            return [self.name, one.text, one.choice_text, one.strict, self.outside]
        return [self.name, asdict(one)]

    @property
    def counts(self) -> bool:
        """Whether what it renders depends on the base's tokens."""
        return isinstance(self.template, TkInstructTemplate)

    @property
    def references(self) -> list[str]:
        """The columns of right answers where the task names none: Super-NaturalInstructions has several a row."""
        return ["outputs"] if isinstance(self.template, TkInstructTemplate) else []

    def columns(self) -> set[str]:
        """The columns that the template uses, as far as they can be told."""
        return self.template.variables()

    def frame(self, values: Mapping[str, Any], where: str) -> Frame | None:
        """The few-shot form that the template brings along, where it does."""
        return Frame(*self.template.frame(values, where)) if isinstance(self.template, FlanTemplate) else None

    def render(
        self, values: Mapping[str, Any], where: str, seed: int, worker: RenderWorker, tokens: TokenCounter | None
    ) -> tuple[list[str], tuple[str, ...]]:
        """Parts and answer choices of one row; `tokens` is there where `counts` says so."""
        if isinstance(self.template, TkInstructTemplate):
            return self.template.parts(values, where, tokens), self.template.choices(values, where) or ()
        draws = f"{seed} {where}"  # of its own for each row: one seed for all would draw the same item in every row
        if self.outside:
            assert isinstance(self.template, Template)
            parts, choices = worker.parts(self.template, values, where, seed=draws)
            return parts, tuple(choices or ())
        parts = self.template.parts(values, where, seed=draws)
        return parts, self.template.choices(values, where) or ()


def resolve_templates(
    specs: str | Sequence[str], choices: str | Sequence[str] | None, folder: Path
) -> list[NamedTemplate]:
    """The templates that `specs` mean; relative files lie in `folder`.

    A spec is Jinja text, ``flan:FILE/task`` (all pairs of a task in a YAML or JSON file; ``flan:FILE/task@few_shot``: of
    another set), ``tk-instruct:def+pos2``, ``promptsource:FOLDER/name`` (a folder with templates.yaml, or a shipped collection) or a
    path to a templates.yaml, which means all of its templates. Raises UserError for what is not there.
    """
    found: list[NamedTemplate] = []
    for number, spec in enumerate([specs] if isinstance(specs, str) else specs, 1):
        if spec.startswith(PREFIX):
            found.append(_outside(_by_reference(spec.removeprefix(PREFIX), folder), choices))
        elif spec.startswith(FLAN):
            found += _flan(spec.removeprefix(FLAN), choices, folder)
        elif spec.startswith(TK_INSTRUCT):
            form = read_form(spec.removeprefix(TK_INSTRUCT), _listed(choices, spec))
            found.append(NamedTemplate(spec, form, outside=False))
        elif spec.endswith((".yaml", ".yml")) and "\n" not in spec and "{" not in spec:
            found += [_outside(entry, choices) for entry in read_templates(folder / Path(spec).expanduser()).values()]
        else:
            found.append(NamedTemplate(f"template {number}", Template(spec, choices), outside=False))
    if not found:
        raise UserError("The task names no template. Write `template: prompt ||| completion`.")
    return found


def chosen_templates(task: Task, folder: Path) -> list[NamedTemplate]:
    """The templates that a task's rows take: all of them, or the one of its number; none for chat logs."""
    if task.template is None:
        return []
    found = resolve_templates(task.template, task.choices, folder)
    if not isinstance(task.template_choice, int):
        return found
    if task.template_choice > len(found):
        raise UserError(
            f"The task {task.name!r} has {len(found)} template{'s' if len(found) > 1 else ''}, and template_choice is "
            f"{task.template_choice}."
        )
    return [found[task.template_choice - 1]]


def in_set(spec: str, kind: str) -> str:
    """The spec of a FLAN task's pairs in another set."""
    return f"{spec.partition('@')[0]}@{kind}"


def _flan(reference: str, choices: str | Sequence[str] | None, folder: Path) -> list[NamedTemplate]:
    file, slash, task = reference.rpartition("/")
    task, _, kind = task.partition("@")
    if not slash or not file.endswith((".yaml", ".yml", ".json")):
        raise UserError(f"'{FLAN}{reference}' names no pairs. Write {FLAN}FILE.yaml/TASK; FILE lies in `data`.")
    found = find_templates(folder / Path(file).expanduser(), task, _listed(choices, FLAN + reference), kind or "pairs")
    return [NamedTemplate(f"{task} {number}", template, outside=False) for number, template in enumerate(found, 1)]


def _listed(choices: str | Sequence[str] | None, spec: str) -> tuple[str, ...] | None:
    if isinstance(choices, str):
        raise UserError(f"'{spec}' takes `choices` as a list, not as Jinja.")
    return None if choices is None else tuple(map(str, choices))


def _outside(entry: Entry, choices: str | Sequence[str] | None) -> NamedTemplate:
    """A file's template, with the task's choices where it brings none; raises UserError for choices unlike its own."""
    template, own = entry.template, entry.template.choice_text
    if choices is not None and not own:
        template = Template(template.text, choices, template.strict)
    elif choices is not None and own and _each(choices) != _each(own):
        raise UserError(
            f"The template {entry.name!r} brings its own answer choices ({own!r:.80}), unlike the task's `choices` "
            f"({choices!r:.80}). Leave `choices` out, or write the template into the recipe."
        )
    return NamedTemplate(entry.name, template, outside=True)


def _each(choices: str | Sequence[str]) -> list[str]:
    return [one.strip() for one in (choices.split(SEPARATOR) if isinstance(choices, str) else map(str, choices))]


def _by_reference(reference: str, folder: Path) -> Entry:
    """`FOLDER/name`, where both may hold slashes: the longest folder that has a templates.yaml counts."""
    shipped = template_files()
    steps = reference.split("/")
    for cut in range(len(steps) - 1, 0, -1):
        place, name = "/".join(steps[:cut]), "/".join(steps[cut:])
        if place in shipped:
            return find_template(shipped[place], name)
        if (file := folder / Path(place).expanduser() / "templates.yaml").is_file():
            return find_template(file, name)
    raise UserError(
        f"'{PREFIX}{reference}' names no template: no templates.yaml lies in {folder / '/'.join(steps[:-1])}. "
        f"{nearest(steps[0], shipped)} Write {PREFIX}FOLDER/name; FOLDER lies in `data` or is a shipped collection."
    )
