"""What a stage has to run: the largest micro-batch, validation group and batch of prompts, and how many tokens in all."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Self

from luthier.data.task import Example, Examples, Task
from luthier.encoding.batches import encode_all, micro_batches
from luthier.encoding.encoder import Encoded, Encoder, cut_middle
from luthier.encoding.order import step_rows
from luthier.evaluation.score import EVALUATION_TOKENS, Question, by_size, longest_choice, prompt_ids, questions
from luthier.held_out import with_its_shots
from luthier.models.base import BaseModel
from luthier.models.generate import MOST_ROWS, batches_by_length
from luthier.models.load import resolve_device
from luthier.recipe import Recipe
from luthier.training_rows import training_rows
from luthier.tuning import FewShot, Interpolation, Method

# More training rows than this are not encoded for a plan; so many steps are looked at for the largest micro-batch.
FEW_ROWS, STEPS = 20_000, 500
# Of validation and test so many rows are looked at for the longest.
LOOKED_AT = 2_000


@dataclass(frozen=True)
class Work:
    """The largest of everything that one tuning runs."""

    earlier: list[
        Encoded
    ]  # a micro-batch of another step, which leaves holes in the heap that are not quite of the right sizes
    largest: list[list[Encoded]]  # of the step with the largest micro-batch: the first, and the largest behind it
    tokens: int  # of the whole training
    said: str  # where the rows come from
    validation: list[Encoded]
    choosing: list[Question]  # whose choices are ranked together
    prompts: list[list[int]]
    new_tokens: int

    @classmethod
    def of(cls, recipe: Recipe, name: str, base: BaseModel) -> Self:
        """What the recipe asks of a tuning. Reads and encodes rows; raises UserError as a run's start does."""
        method, encoder = recipe.method(name), recipe.read_encoder()
        tasks = [(task, recipe.examples(task)) for task in recipe.tasks]
        grafted = recipe.method(method.of) if isinstance(method, Interpolation) else method
        reserve = grafted.virtual_tokens() if isinstance(grafted, Method) else 0
        steps: list[list[Encoded]] = []
        tokens, said = 0, ""
        if isinstance(method, Method):
            steps, tokens, said = _training(recipe, name, tasks, encoder, reserve, base)
        if isinstance(method, FewShot):
            encoder = encoder.widened(base.context)
            tasks = with_its_shots(method, [(task, _longest(each)) for task, each in tasks], encoder, recipe.seed)
        chosen = recipe.tunings[method.of if isinstance(method, Interpolation) else name].tasks
        held = [one for task, each in tasks if not chosen or task.name in chosen for one in each.validation[:LOOKED_AT]]
        groups = micro_batches(encode_all(encoder, held, reserve), EVALUATION_TOKENS, padded=base.pads)
        prompts, new_tokens = _prompts(tasks, encoder, reserve)
        if prompts:
            device = resolve_device(recipe.base.device).type
            together = batches_by_length(prompts, recipe.decoding.batch_size, device)[0]
            prompts = [prompts[place] for place in together]
        return cls(
            steps[0] if steps else [], steps[1:], tokens, said, max(groups, key=_size, default=[]),
            _choosing(tasks, encoder, reserve, base), prompts, new_tokens,
        )  # fmt: skip


def _size(group: Sequence[Encoded]) -> tuple[int, int]:
    return sum(map(len, group)), sum(len(row) ** 2 for row in group)


def _training(
    recipe: Recipe, name: str, tasks: list[tuple[Task, Examples]], encoder: Encoder, reserve: int, base: BaseModel
) -> tuple[list[list[Encoded]], int, str]:
    """Of the training rows an earlier micro-batch, and those of the step with the largest; their tokens; which rows they are.

    Where there are too many or they are streamed, of rows of `max_length`.
    """
    settings = recipe.tunings[name].training
    budget = settings.token_budget(resolve_device(recipe.base.device).type, base.blocks * base.width)
    padded = base.pads
    if all(each.stream is None and 0 < len(each.train) <= FEW_ROWS for _, each in tasks):
        stream, _ = training_rows(recipe, recipe.tunings[name], tasks, encoder, reserve)
        steps = settings.steps(len(stream))
        looked_at = min(steps, STEPS)
        worst: list[list[Encoded]] = []
        earlier: list[Encoded] = []
        tokens = 0
        cost = lambda group: (len(group) * len(group[0]) if padded else 0, *_size(group))  # noqa: E731
        for step in range(looked_at):
            groups = micro_batches(step_rows(stream, settings.batch_size, step), budget, padded)
            tokens += sum(len(row) for group in groups for row in group)
            if not worst or max(map(cost, groups)) > max(map(cost, worst)):
                worst, earlier = groups, earlier if not worst else max(worst, key=cost)
            elif not earlier:
                earlier = max(groups, key=cost)
        behind = [max(worst[1:], key=cost)] if worst[1:] else []
        return [earlier or worst[0], worst[0], *behind], tokens * steps // looked_at, "the training rows"
    target = max(1, encoder.max_length // 4)
    prompt = encoder.max_length - (0 if encoder.encoder_decoder else target)
    rows = [Encoded("longest", [0] * prompt, [0] * target)] * settings.batch_size
    groups = micro_batches(rows, budget, padded)
    steps = settings.steps(sum(len(each.train) for _, each in tasks if each.stream is None) or settings.batch_size)
    said = f"rows of max_length ({encoder.max_length} tokens)"
    return [groups[0], *groups[:2]], steps * sum(map(len, rows)), said


def _longest(examples: Examples) -> Examples:
    """The longest of the first rows, as many as may be decoded together: counting what fits with shots takes time."""
    pick = lambda rows: sorted(islice(rows, LOOKED_AT), key=lambda one: -len(one.prompt))[:MOST_ROWS]  # noqa: E731
    return replace(examples, validation=pick(examples.validation), test=pick(examples.test))


def _prompts(tasks: Sequence[tuple[Task, Examples]], encoder: Encoder, reserve: int) -> tuple[list[list[int]], int]:
    """The prompts that are answered in free text, and the most tokens that are written behind them."""
    found: list[list[int]] = []
    most = 0
    for task, each in tasks:
        if task.choices:
            continue
        room = max(1, encoder.max_length - (0 if encoder.encoder_decoder else reserve + task.max_new_tokens))
        found += [cut_middle(encoder.prompt_ids(one), room) for one in islice(each.test, LOOKED_AT)]
        most = max(most, task.max_new_tokens)
    return found, most


def _choosing(
    tasks: Sequence[tuple[Task, Examples]], encoder: Encoder, reserve: int, base: BaseModel
) -> list[Question]:
    """The largest group of examples whose choices are ranked together."""
    groups: list[tuple[list[Example], list[list[int]]]] = []
    for some in (part for task, each in tasks if task.choices for part in (each.validation, each.test) if part):
        examples = list(islice(some, LOOKED_AT))
        room = reserve + max(longest_choice(encoder, one) for one in examples)
        prompts = [prompt_ids(encoder, one, room) for one in examples]
        for places in by_size(base, encoder, examples, prompts):
            groups.append(([examples[place] for place in places], [prompts[place] for place in places]))
    if not groups:
        return []
    return questions(base, encoder, *max(groups, key=lambda group: sum(map(len, group[1]))))
