"""What a tuning is trained on: its task's rows, or draws from a mixture; and the table of what was drawn."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from luthier.data.forms import in_form
from luthier.data.mixture import entries, epoch_size
from luthier.data.task import Example, Examples, Task
from luthier.encoding.encoder import Encoded, Encoder
from luthier.encoding.order import Mixed, Shuffled, Stream, step_places
from luthier.recipe import Recipe


def training_rows(
    recipe: Recipe,
    names: Sequence[str] | None,
    tasks: Sequence[tuple[Task, Examples]],
    encoder: Encoder,
    reserve: int,
    encode: Callable[[Sequence[Example], str], list[Encoded]],
) -> tuple[Stream, Callable[[int, int], dict[str, Any]]]:
    """The rows in their order, and what to report of them after so many steps of that batch size.

    `names` chooses among a mixture's tasks; `reserve` tokens are kept free in every row; `encode` encodes examples,
    told what they are.
    """
    mixture, seed = recipe.task, recipe.seed
    examples = {task.name: each for task, each in tasks}
    if isinstance(mixture, Task):
        rows = encode(examples[mixture.name].train, "training")
        return Shuffled(rows, seed), lambda batch, steps: {"cut": sum(bool(row.cut) for row in rows), "mixture": []}
    chosen = mixture.only(names) if names else mixture
    count = lambda task: len(examples[task.name].train)  # noqa: E731
    flat = entries(chosen, count)
    budget = encoder.max_length - reserve
    each = []
    for entry in flat:
        train_rows = examples[entry.task.name].train
        shown = in_form(entry, train_rows, Path(recipe.data), seed, budget, encoder.count)
        each.append(encode(shown, f"training ({entry.task.name}, {entry.form})"))
    stream = Mixed(each, [entry.rate for entry in flat], epoch_size(chosen, count), seed)

    def describe(batch: int, steps: int) -> dict[str, Any]:
        drawn = step_places(stream, batch, steps - 1).stop if steps else 0
        tokens = [0] * len(flat)
        for k in range(drawn):
            place, row = stream.draws.at(k)
            tokens[place] += len(each[place][row])
        table = [
            {
                "task": entry.task.name,
                "form": entry.form,
                "asked": entry.rate,
                "got": got / max(1, drawn),
                "rows": len(rows),
                "epochs": got / len(rows),
                "tokens": of,
            }
            for entry, rows, got, of in zip(flat, each, stream.draws.counts(drawn), tokens, strict=True)
        ]
        return {"cut": sum(bool(row.cut) for rows in each for row in rows), "mixture": table}

    return stream, describe
