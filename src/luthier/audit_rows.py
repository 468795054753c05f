"""Is my data sound? Every row of a recipe, read and checked before anything is trained."""

from collections.abc import Sequence
from dataclasses import replace

from luthier.data.findings import Finding, errors
from luthier.data.task import Examples
from luthier.encoding.audit import audit_tasks
from luthier.errors import UserError
from luthier.recipe import Recipe


def audit(recipe: Recipe, loaded: Sequence[Examples] | None = None) -> list[Finding]:
    """All findings on the recipe's task, or on each of its mixture's, errors first; reads the tokenizer, no weights.

    A kind named in the recipe's `allow` is a warning. Raises UserError for data that cannot be read at all.
    """
    if loaded is None:
        loaded = [recipe.examples(task) for task in recipe.tasks]
    named = [(task.name, examples) for task, examples in zip(recipe.tasks, loaded, strict=True)]
    found: list[Finding] = []
    for (name, _), of_task in zip(named, audit_tasks(recipe.read_encoder(), named), strict=True):
        prefix = f"{name} " if len(named) > 1 else ""
        found += [replace(one, split=f"{prefix}{one.split}") for one in of_task]
    for task, (name, examples) in zip(recipe.tasks, named, strict=True):
        if task.train and task.train.stream:
            split = f"{name} train" if len(named) > 1 else "train"
            advice = (
                f"{task.train.path} is streamed: of its rows the first {len(examples.train)} in training order were audited "
                f"(shards in the order of seed {recipe.seed}, shuffled through a buffer of {task.train.buffer}), no others."
            )
            found.append(Finding("a sample was audited", "warning", split, len(examples.train), (), "", advice))
    found = [replace(one, level="warning") if one.kind in recipe.allow else one for one in found]
    return sorted(found, key=lambda one: one.level)


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
