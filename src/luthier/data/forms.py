"""The forms in which a mixture shows a task's training rows: alone, behind examples, with its answer choices, with
reasons, from the answer back to the question.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from luthier.cached import digest
from luthier.data.formats.flan import options_field
from luthier.data.formats.flan_file import SETS
from luthier.data.lazy import Lazy
from luthier.data.mixture import Entry, Form
from luthier.data.shots import with_shots
from luthier.data.stored import StoredExamples
from luthier.data.task import Example, Examples, Task
from luthier.data.templates import FLAN, in_set

# Rows looked at for each shot that is wanted.
SPARE = 3


class InForm(Lazy[Example]):
    """A task's training examples in an entry's form, each made when it is asked for.

    A few-shot row has its own shots, drawn by seed and row from the other rows, as many as fit `budget` tokens. `listed`
    puts FLAN's list of answer choices below a prompt; a task without choices stays as it is.
    """

    def __init__(
        self,
        entry: Entry,
        train: Sequence[Example],
        key: str,
        seed: int,
        budget: int,
        count_tokens: Callable[[Example], int],
        listed: bool,
    ):
        self.train, self.seed, self.budget, self.count_tokens = train, seed, budget, count_tokens
        self.listed, self.shots = listed, entry.shots
        self.few_shot = entry.form.startswith("few_shot")
        self.key = digest([key, entry.form, *([entry.shots, seed, budget] if self.few_shot else [])])

    def __len__(self) -> int:
        return len(self.train)

    def at(self, place: int) -> Example:
        """The example at `place` in this form."""
        example = self._shown(place)
        if not self.few_shot:
            return example
        drawn = self._drawn(example)
        if example.frame is None:
            return with_shots(example, [(one.prompt, one.completion) for one in drawn], self.budget, self.count_tokens)
        for kept in range(len(drawn), 0, -1):
            fuller = framed(example, drawn[:kept])
            if self.count_tokens(fuller) <= self.budget:
                return fuller
        return example

    def _shown(self, place: int) -> Example:
        example = self.train[place]
        if not (self.listed and example.choices):
            return example
        return replace(example, prompt=f"{example.prompt}\n\n{options_field(example.choices)}")

    def _drawn(self, example: Example) -> list[Example]:
        draws = random.Random(f"shots {self.seed} {example.id} {example.prompt}")
        found: list[Example] = []
        for place in draws.sample(range(len(self)), min(SPARE * self.shots + 1, len(self))):
            shown = self._shown(place)
            # A row may stand here more than once, by several templates or as a copy: its own answer must not be shown.
            same = shown.id == example.id or (shown.prompt, shown.completion) == (example.prompt, example.completion)
            if shown.completion and not same and len(found) < self.shots:
                found.append(shown)
        return found


def framed(example: Example, exemplars: Sequence[Example]) -> Example:
    """An example behind exemplars with FLAN's few-shot delimiters, each row with its own pattern's."""
    frame = example.frame
    assert frame is not None
    shown = [
        f"{one.frame.opening}{one.prompt}{one.frame.asking}{one.completion}"
        for one in exemplars
        if one.frame is not None
    ]
    body = frame.separator.join([*shown, f"{frame.opening}{example.prompt}{frame.asking}"]).rstrip(" ")
    return replace(example, prompt=f"{frame.before}{body}{frame.after}", frame=None)


def in_form(
    entry: Entry,
    train: StoredExamples,
    load: Callable[[Task], Examples],
    seed: int,
    budget: int,
    count_tokens: Callable[[Example], int],
) -> StoredExamples | InForm:
    """The training examples of an entry's task in the entry's form; `budget` and `count_tokens` limit the shots.

    `load` reads the task once more where the form has a template of its own.
    """
    task, form = entry.task, entry.form
    own = task_in_form(task, form)
    if own is not None:
        train = _stored(load(own))
    if form in ("chain_of_thought", "inverted"):
        return train
    listed = form.endswith("_options") and own is None  # FLAN's pairs say themselves where the choices stand
    if form.startswith("few_shot") or listed:
        return InForm(entry, train, train.key, seed, budget, count_tokens, listed)
    return train


def task_in_form(task: Task, form: Form) -> Task | None:
    """The task with the form's own template; None where the form shows the task's plain rows."""
    if form in ("chain_of_thought", "inverted"):
        return replace(task, template=getattr(task, form), choices=None)
    if isinstance(task.template, str) and task.template.startswith(FLAN):
        kind = next(kind for kind, of in SETS.items() if of == form)
        return replace(task, template=in_set(task.template, kind))
    return None


def _stored(examples: Examples) -> StoredExamples:
    assert isinstance(examples.train, StoredExamples)
    return examples.train
