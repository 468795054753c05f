"""The prompt that is best on validation: what changing the wording alone gives, as a baseline for tuning."""

from dataclasses import replace
from typing import Any

from luthier.data.task import Examples, Task
from luthier.data.templates import resolve_templates
from luthier.errors import UserError
from luthier.evaluation.kept import entry
from luthier.metrics import reading
from luthier.metrics.score import Score
from luthier.recipe import Recipe
from luthier.scoring import Stage, judge
from luthier.tuning import BestTemplate


def candidates(recipe: Recipe, task: Task, method: BestTemplate) -> list[tuple[str, Task]]:
    """By name, the task with each of its templates alone; raises UserError where there is nothing to choose among."""
    whole = replace(task, template=method.templates) if method.templates else task
    if whole.template is None:
        raise UserError(f"best_template: the task {task.name!r} reads chat logs, which have no template to choose.")
    found = resolve_templates(whole.template, whole.choices, recipe.data_folder)
    if len(found) < 2:
        raise UserError(
            f"best_template: the task {task.name!r} has one template. Name several, in the task's `template` or in the tuning's "
            "`templates`."
        )
    return [(one.name, replace(whole, template_choice=number)) for number, one in enumerate(found, 1)]


def best_templates(
    stage: Stage, method: BestTemplate
) -> tuple[list[tuple[Task, Examples]], dict[str, list[dict[str, Any]]]]:
    """Each task with the template that scores best by its main metric on validation, and what every template scored.

    A template that leaves out test rows is not chosen: scores on other rows would not be comparable.
    """
    chosen, tried = [], {}
    for task, examples in stage.tasks:
        rows: list[dict[str, Any]] = []
        best: tuple[float, Task, Examples] | None = None
        for name, one in candidates(stage.recipe, task, method):
            shown = stage.recipe.examples(one)
            if [row.id for row in shown.test] != [row.id for row in examples.test]:
                stage.progress.say(f"{name!r} does not apply to all test rows, so it is not tried")
                continue
            found = _score(stage, task, shown, method.rows)
            rows.append({"name": name, "number": one.template_choice, "chosen": False, **entry(found)})
            value = -found.value if reading(task.judged_by[-1]).lower_is_better else found.value
            if best is None or value > best[0]:
                best = (value, one, shown)
        if best is None:
            raise UserError(f"best_template: no template of the task {task.name!r} applies to all of its test rows.")
        for row in rows:
            row["chosen"] = row["number"] == best[1].template_choice
        tried[task.name] = rows
        # What judges the test, and how long answers are, stays the task's.
        chosen.append((best[1], best[2]))
    return chosen, tried


def _score(stage: Stage, task: Task, shown: Examples, limit: int) -> Score:
    """The task's main metric on the first `limit` validation rows (0: all)."""
    rows = shown.validation[:limit] if limit else shown.validation
    if not rows:
        raise UserError(f"best_template chooses on validation, and the task {task.name!r} has no validation rows.")
    metric = task.judged_by[-1]
    stage.progress.begin(f"trying a template of {task.name}", len(rows))
    return judge(stage, task, rows, [metric], 0, stage.progress.advance)[0][metric]
