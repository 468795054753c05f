"""The forms in which a mixture shows a task's training rows: alone, behind examples, with its answer choices, with reasons."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from luthier.data.formats.flan import options_field
from luthier.data.mixture import Entry
from luthier.data.shots import with_shots
from luthier.data.task import Example, load_examples


def in_form(
    entry: Entry, train: Sequence[Example], folder: Path, seed: int, budget: int, count_tokens: Callable[[Example], int]
) -> list[Example]:
    """The training examples of an entry's task in the entry's form.

    A few-shot row has its own shots, drawn by seed and row from the other rows, as many as fit `budget` tokens.
    """
    if entry.form == "chain_of_thought":
        assert entry.task.chain_of_thought is not None
        return load_examples(
            replace(entry.task, template=entry.task.chain_of_thought, choices=None), folder, seed
        ).train
    shown = [_with_options(example) for example in train] if entry.form.endswith("_options") else list(train)
    if entry.form.startswith("few_shot"):
        return [with_shots(one, _drawn(one, shown, entry.shots, seed), budget, count_tokens) for one in shown]
    return shown


def _with_options(example: Example) -> Example:
    """FLAN's list of answer choices below the prompt; a task without choices stays as it is."""
    if not example.choices:
        return example
    return replace(example, prompt=f"{example.prompt}\n\n{options_field(example.choices)}")


def _drawn(example: Example, others: Sequence[Example], count: int, seed: int) -> list[tuple[str, str]]:
    draws = random.Random(f"shots {seed} {example.id} {example.prompt}")
    found: list[tuple[str, str]] = []
    for place in draws.sample(range(len(others)), min(count + 1, len(others))):
        if len(found) < count and others[place] is not example and others[place].completion:
            found.append((others[place].prompt, others[place].completion))
    return found
