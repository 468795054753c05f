"""Rows that tunings are not trained on: those of a finished run, and those asked with examples before them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from luthier.data.shots import choose_shots, similar_shots, with_shots
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
    """Tasks whose validation and test rows have a prompting method's training pairs before them, the same for all or those most
    like each, as many as fit the encoder's rows.
    """
    if not isinstance(method, FewShot):
        return list(tasks)
    seed += DRAWS_APART * method.draw
    similar = method.selection == "similar"
    found = []
    for task, examples in tasks:
        asked, budget = method.shot_count(), encoder.max_length - task.max_new_tokens
        if method.shots == "full":
            asked = min(asked, sum(bool(one.completion) for one in examples.train))
        same = [] if similar else choose_shots(examples.train, asked, seed)
        splits: dict[str, Any] = {}
        for split in ("validation", "test"):
            rows = getattr(examples, split)
            pairs = similar_shots(examples.train, rows, asked, seed) if similar else [same] * len(rows)
            splits[split] = [
                with_shots(row, each, budget, encoder.count, first_last=similar)
                for row, each in zip(rows, pairs, strict=True)
            ]
        found.append((task, replace(examples, **splits)))
    return found
