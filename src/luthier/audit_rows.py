"""Is my data sound? Every row of a recipe, read and checked before anything is trained."""

from collections.abc import Sequence
from dataclasses import replace

from luthier.data.findings import Finding, errors, finding
from luthier.data.forms import task_in_form
from luthier.data.mixture import Form, entries
from luthier.data.task import Examples, Task
from luthier.encoding.audit import audit_tasks
from luthier.errors import UserError
from luthier.recipe import Recipe


def audit(recipe: Recipe, loaded: Sequence[Examples] | None = None) -> list[Finding]:
    """All findings on the recipe's tasks, on the forms a mixture shows them in, on its retention tasks and what it replays, errors
    first.

    Reads the tokenizer, no weights. `loaded` are the examples of tasks and retention tasks, where the caller has them. A
    kind named in the recipe's `allow` is a warning. Raises UserError for data that cannot be read at all.
    """
    tasks = [*recipe.tasks, *recipe.retention, *recipe.replayed]
    loaded = [*(loaded or ()), *(recipe.examples(task) for task in tasks[len(loaded or ()) :])]
    named = [(task.name, examples) for task, examples in zip(tasks, loaded, strict=True)]
    forms = [(f"{task.name} ({form})", recipe.examples(own, train_only=True)) for task, form, own in _own_forms(recipe)]
    found: list[Finding] = []
    for (name, _), of_task in zip([*named, *forms], audit_tasks(recipe.read_encoder(), [*named, *forms]), strict=True):
        found += [replace(one, split=_split(recipe, name, one.split)) for one in of_task]
    for task, (name, examples) in zip(tasks, named, strict=True):
        found += _left_out(task, examples, _split(recipe, name, "train"))
        if task.train and task.train.stream:
            advice = (
                f"{task.train.path} is streamed: of its rows the first {len(examples.train)} in training order were audited "
                f"(shards in the order of seed {recipe.seed}, shuffled through a buffer of {task.train.buffer}), no others."
            )
            split = _split(recipe, name, "train")
            found.append(Finding("a sample was audited", "warning", split, len(examples.train), (), "", advice))
    found = [replace(one, level="warning") if one.kind in recipe.allow else one for one in found]
    return sorted(found, key=lambda one: one.level)


def _split(recipe: Recipe, name: str, split: str) -> str:
    """A split as it is named in a finding: of the recipe's one task by itself, else with the task's name."""
    return split if isinstance(recipe.task, Task) and name == recipe.task.name else f"{name} {split}"


def _own_forms(recipe: Recipe) -> list[tuple[Task, Form, Task]]:
    """The forms of a mixture that have a template of their own: the task, the form, the task with that template."""
    if isinstance(recipe.task, Task):
        return []
    streamed = {task.name for task in recipe.tasks if task.train and task.train.stream}
    shown = {(entry.task.name, entry.form): entry for entry in entries(recipe.task, lambda _: 1)}
    each = [(one.task, one.form, task_in_form(one.task, one.form)) for one in shown.values()]
    return [(task, form, own) for task, form, own in each if own is not None and task.name not in streamed]


def _left_out(task: Task, examples: Examples, split: str) -> list[Finding]:
    """Rows to which a template from outside does not apply; an error where no training row is left."""
    none_left = task.train is not None and not examples.train
    advice = "The template renders no prompt or no completion for these rows, so they are left out"
    advice += ": no training row is left." if none_left else "."
    if none_left and not examples.skipped:
        return [Finding("no training rows", "error", split, 0, (), "", "The training source holds no row.")]
    return finding("template does not apply", "error" if none_left else "warning", split, examples.skipped, "", advice)


def stop_on_errors(found: list[Finding]) -> None:
    """Raise a UserError that names every error and its rows; warnings pass."""
    if wrong := errors(found):
        lines = [f"{one.split}: {one.kind}: {one.count} rows ({named(one)}). {one.advice}" for one in wrong]
        raise UserError(
            "The audit found rows that cannot be trained on or scored:\n- " + "\n- ".join(lines) + "\nSee them with "
            "`luthier audit`; to go on all the same, name the kinds in the recipe: allow: ["
            + ", ".join(sorted({one.kind for one in wrong}))
            + "]."
        )


def named(one: Finding) -> str:
    """The first few row ids of a finding."""
    return ", ".join(one.rows[:5]) + (" ..." if one.count > 5 else "")
