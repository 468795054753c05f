"""The forms in which a mixture shows a task's training rows: alone, behind examples, with its answer choices, with reasons."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from luthier.cached import digest
from luthier.data.formats.flan import options_field
from luthier.data.lazy import Lazy
from luthier.data.load import load_examples
from luthier.data.mixture import Entry
from luthier.data.shots import with_shots
from luthier.data.stored import StoredExamples
from luthier.data.task import Example


class InForm(Lazy[Example]):
    """A task's training examples in an entry's form, each made when it is asked for.

    A few-shot row has its own shots, drawn by seed and row from the other rows, as many as fit `budget` tokens.
    """

    def __init__(
        self,
        entry: Entry,
        train: Sequence[Example],
        key: str,
        seed: int,
        budget: int,
        count_tokens: Callable[[Example], int],
    ):
        self.train, self.seed, self.budget, self.count_tokens = train, seed, budget, count_tokens
        self.options, self.shots = entry.form.endswith("_options"), entry.shots
        self.few_shot = entry.form.startswith("few_shot")
        self.key = digest([key, entry.form, *([entry.shots, seed, budget] if self.few_shot else [])])

    def __len__(self) -> int:
        return len(self.train)

    def at(self, place: int) -> Example:
        """The example at `place` in this form."""
        example = self._shown(place)
        if not self.few_shot:
            return example
        return with_shots(example, self._drawn(place, example), self.budget, self.count_tokens)

    def _shown(self, place: int) -> Example:
        """Where asked for, with FLAN's list of answer choices below the prompt; a task without choices stays as it is."""
        example = self.train[place]
        if not (self.options and example.choices):
            return example
        return replace(example, prompt=f"{example.prompt}\n\n{options_field(example.choices)}")

    def _drawn(self, own: int, example: Example) -> list[tuple[str, str]]:
        draws = random.Random(f"shots {self.seed} {example.id} {example.prompt}")
        found: list[tuple[str, str]] = []
        for place in draws.sample(range(len(self)), min(self.shots + 1, len(self))):
            if len(found) < self.shots and place != own:
                shown = self._shown(place)
                if shown.completion:
                    found.append((shown.prompt, shown.completion))
        return found


def in_form(
    entry: Entry, train: StoredExamples, folder: Path, seed: int, budget: int, count_tokens: Callable[[Example], int]
) -> StoredExamples | InForm:
    """The training examples of an entry's task in the entry's form; `budget` and `count_tokens` limit the shots."""
    if entry.form == "chain_of_thought":
        assert entry.task.chain_of_thought is not None
        reasoned = load_examples(replace(entry.task, template=entry.task.chain_of_thought, choices=None), folder, seed)
        assert isinstance(reasoned.train, StoredExamples)
        return reasoned.train
    if entry.form == "zero_shot":
        return train
    return InForm(entry, train, train.key, seed, budget, count_tokens)
