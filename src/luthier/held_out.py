"""Rows that tunings are not trained on: those of a finished run, and those asked with examples before them."""

from collections.abc import Sequence

from luthier.data.shots import shown
from luthier.data.task import Example, Examples, Task
from luthier.encoding.encoder import Encoder
from luthier.errors import UserError
from luthier.recipe import Recipe
from luthier.tuning import FewShot, Prompting

DRAWS_APART = 1_000_003  # between the seeds of few-shot draws, so that no run's next seed draws the same


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


def with_its_shots(
    method: Prompting, tasks: Sequence[tuple[Task, Examples]], encoder: Encoder, seed: int
) -> list[tuple[Task, Examples]]:
    """Tasks whose validation and test rows have a prompting method's shots before them, as many as fit the encoder's rows."""
    similar = isinstance(method, FewShot) and method.selection == "similar"
    full = isinstance(method, FewShot) and method.shots == "full"
    seed += DRAWS_APART * (method.draw if isinstance(method, FewShot) else 0)
    asked = method.shot_count()
    return [
        (task, shown(each, asked, seed, encoder.max_length - task.max_new_tokens, encoder.count, similar, full))
        for task, each in tasks
    ]
