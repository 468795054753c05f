"""Rows of a finished run that its tunings were not trained on."""

from collections.abc import Sequence

from luthier.data.task import Example, Task
from luthier.errors import UserError
from luthier.recipe import Recipe


def held_out(recipe: Recipe, tuning: str, limit: int) -> tuple[str, list[tuple[Task, Sequence[Example]]]]:
    """The split's name and, for each task the tuning learnt, its first rows: at most `limit` in all.

    Validation rows, or test rows where a task has none. Raises UserError where there are neither.
    """
    names = recipe.tunings[tuning].tasks
    tasks = [task for task in recipe.tasks if not names or task.name in names]
    loaded = [recipe.examples(task) for task in tasks]
    split = "validation" if all(examples.validation for examples in loaded) else "test"
    share = max(1, limit // len(tasks))
    found: list[tuple[Task, Sequence[Example]]] = [
        (task, list(getattr(examples, split))[:share]) for task, examples in zip(tasks, loaded, strict=True)
    ]
    if not any(rows for _, rows in found):
        raise UserError(f"The run holds neither validation nor test rows of {', '.join(task.name for task in tasks)}.")
    return split, found
