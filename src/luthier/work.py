"""What a stage has to run: the largest micro-batch, validation group and batch of prompts, and how many tokens in all."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self

from luthier.data.task import Example, Examples, Task
from luthier.encoding.batches import encode_all, micro_batches
from luthier.encoding.encoder import Encoded, Encoder, cut_middle
from luthier.encoding.order import step_rows
from luthier.evaluation.score import EVALUATION_TOKENS
from luthier.models.base import BaseModel
from luthier.models.generate import batches_by_length
from luthier.models.load import resolve_device
from luthier.recipe import AnyMethod, Recipe
from luthier.training_rows import training_rows
from luthier.tuning import FewShot, Interpolation, Method, Prompting

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
        chosen = recipe.tunings[method.of if isinstance(method, Interpolation) else name].tasks
        held = [one for task, each in tasks if not chosen or task.name in chosen for one in each.validation[:LOOKED_AT]]
        extra = _shots(method, tasks, encoder)
        if extra:
            encoder = encoder.widened(base.context)
            extra = min(extra, encoder.max_length)
        groups = micro_batches(
            [_longer(row, extra, encoder.max_length) for row in encode_all(encoder, held, reserve)],
            EVALUATION_TOKENS,
            padded=base.pads,
        )
        apart = isinstance(method, FewShot) and method.selection == "similar"
        prompts, new_tokens = _prompts(tasks, encoder, reserve, extra, apart)
        if prompts:
            together = batches_by_length(prompts, device=resolve_device(recipe.base.device).type)[0]
            prompts = [prompts[place] for place in together]
        return cls(
            steps[0] if steps else [], steps[1:], tokens, said, max(groups, key=_size, default=[]), prompts, new_tokens
        )


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


def _shots(method: AnyMethod, tasks: list[tuple[Task, Examples]], encoder: Encoder) -> int:
    """Tokens that shots add to a prompt, at most."""
    asked = method.shot_count() if isinstance(method, Prompting) else 0
    if not asked:
        return 0
    return asked * max((encoder.count(one) for _, each in tasks for one in islice(each.train, LOOKED_AT)), default=0)


def _longer(row: Encoded, extra: int, limit: int) -> Encoded:
    room = max(0, limit - len(row.prompt) - len(row.target))
    return Encoded(row.id, row.prompt + [0] * min(extra, room), row.target) if extra else row


def _prompts(
    tasks: list[tuple[Task, Examples]], encoder: Encoder, reserve: int, extra: int, apart: bool
) -> tuple[list[list[int]], int]:
    """The prompts, and the most tokens that are written behind them.

    The shots stand before them, the same for all and so computed once; or each row has its own (`apart`).
    """
    found: list[list[int]] = []
    most = 0
    for task, each in tasks:
        examples: list[Example] = list(islice(each.test, LOOKED_AT))
        room = max(1, encoder.max_length - (0 if encoder.encoder_decoder else reserve + task.max_new_tokens))
        for place, one in enumerate(examples):
            shots = [0] * extra if not apart else [place] * extra
            found.append(cut_middle([*shots, *encoder.prompt_ids(one)], room))
        most = max(most, task.max_new_tokens)
    return found, most
