"""What a stage scores: its tuning on the task's validation and test rows and on the retention tasks."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from luthier.data.mixture import Mixture
from luthier.data.task import Example, Examples, Task
from luthier.directory import Answers, RunDirectory
from luthier.encoding.batches import encode_all
from luthier.encoding.encoder import Encoded, Encoder
from luthier.errors import Interrupted, UserError
from luthier.evaluation.kept import keep, keep_mean
from luthier.evaluation.score import Prediction, answer, loss_and_accuracy, losses, measure, prompt_ids
from luthier.evaluation.speed import inference_cost
from luthier.metrics import MODEL_METRICS
from luthier.metrics.score import Score
from luthier.models.base import BaseModel
from luthier.models.shard import inside
from luthier.progress import Progress
from luthier.recipe import Recipe
from luthier.training.loop import Validation
from luthier.training.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Stage:
    """What every step of a stage needs."""

    directory: RunDirectory
    recipe: Recipe
    base: BaseModel
    encoder: Encoder
    tasks: list[tuple[Task, Examples]]  # one, or those of a mixture
    progress: Progress
    should_stop: Callable[[], bool]
    ranks: Ranks = ALONE  # each answers its share of the examples


def validation_examples(stage: Stage, names: Sequence[str] | None = None) -> list[Example]:
    """The validation examples of these tasks, by default all."""
    return [one for task, examples in stage.tasks if not names or task.name in names for one in examples.validation]


def validate(
    stage: Stage, rows: list[Encoded], reserve: int, watch: str = "loss", names: Sequence[str] | None = None
) -> Validation:
    """Loss on the validation targets, accuracy (of the answers where there are choices, else of the next token), and
    the metric that training watches, over the tasks of these names.
    """
    loss, accuracy = loss_of(stage.base, rows, stage.ranks)
    scores: dict[str, float] = {}
    if watch not in ("loss", "accuracy"):
        longest = max(task.max_new_tokens for task, _ in stage.tasks if not names or task.name in names)
        found = measure(_answer(stage, validation_examples(stage, names), longest, reserve), [watch])
        scores[watch] = found[watch].value
    if isinstance(stage.recipe.task, Task) and stage.recipe.task.choices:
        answers = _answer(stage, validation_examples(stage), 1, reserve)
        accuracy = sum(one.prediction in one.references for one in answers) / len(answers)
    return Validation(loss, accuracy, scores)


def loss_of(base: BaseModel, rows: list[Encoded], ranks: Ranks = ALONE) -> tuple[float, float]:
    """Mean loss (nats per target token) and next-token accuracy of rows, of which each rank runs its share."""
    if ranks.size == 1 or ranks.sharded:
        with torch.no_grad():
            return inside(base, lambda: loss_and_accuracy(base, rows))
    own = ranks.split(rows)[ranks.rank]
    count = sum(len(row.labels) for row in own)
    loss, accuracy = loss_and_accuracy(base, own) if own else (0.0, 0.0)
    total, hits, targets = ranks.add(loss * count, accuracy * count, count)
    return total / targets, hits / targets


def _answer(
    stage: Stage,
    examples: Sequence[Example],
    new_tokens: int,
    reserve: int,
    tell: Callable[[int, int], None] = lambda done, of: None,
    answers: Answers | None = None,
) -> list[Prediction]:
    """Answers of all ranks together; with `answers` they are kept as they come."""
    ranks = stage.ranks
    # Before any rank writes: of a divided base all must know, and skip, the same.
    known = ranks.first(answers.known() if answers and ranks.rank == 0 else {})
    keeps = answers is not None and (ranks.rank == 0 or not ranks.sharded)
    with torch.no_grad():
        return inside(
            stage.base,
            lambda: answer(
                stage.base,
                stage.encoder,
                examples,
                new_tokens,
                reserve,
                tell,
                stage.recipe.decoding,
                known,
                answers.keep if answers and keeps else lambda found: None,
                ranks.gathered,
            ),
        )


def score_tasks(stage: Stage, name: str, reserve: int) -> dict[str, Any]:
    """Scores of the recipe's task; of a mixture, of each of its tasks and their mean."""
    scores = {task.name: _score(stage, name, task, examples.test, reserve) for task, examples in stage.tasks}
    if isinstance(stage.recipe.task, Mixture):
        judged = [(task.name, task.judged_by[-1]) for task in stage.recipe.tasks]
        scores[stage.recipe.task.name] = keep_mean(scores, judged)
    return scores


def request_cost(stage: Stage, name: str | None, reserve: int) -> dict[str, Any] | None:
    """What one request of the recipe's (first) task costs with the active tuning `name`, as `inference_cost` measures it.

    None where the base is divided over processes: nobody answers a request so.
    """
    if stage.base.sharded:
        return None
    task, examples = stage.tasks[0]
    stage.progress.say("timing a request")
    prompts = [prompt_ids(stage.encoder, one, reserve + task.max_new_tokens) for one in examples.test]
    return inference_cost(stage.base, prompts, name)


def score_retention(stage: Stage, name: str, reserve: int) -> dict[str, Any]:
    """Scores of the retention tasks."""
    scores = {}
    for task in stage.recipe.retention:
        examples = stage.recipe.examples(task)
        scores[task.name] = _score(stage, name, task, examples.test, reserve)
    return scores


def _score(stage: Stage, name: str, task: Task, examples: Sequence[Example], reserve: int) -> dict[str, Any]:
    """Answer a task's test examples; write the predictions as they come; return the report's entries and values.

    A stage that was stopped here goes on behind the answers it has; they are those of the same weights, because what is
    trained is saved before anything is scored.
    """
    if not examples:
        raise UserError(f"The test split of task {task.name!r} has no rows.")

    def tell(done: int, of: int) -> None:
        stage.progress.advance(done, of)
        if stage.should_stop():
            raise Interrupted(f"Scoring {name!r} was stopped; what was trained is saved.")

    started = time.perf_counter()
    stage.progress.begin(f"scoring {task.name}", len(examples))
    answers = stage.directory.answers_so_far(name, task.name, stage.ranks.rank)
    scores, predictions = judge(stage, task, examples, task.judged_by, reserve, tell, answers)
    if predictions:
        lines = [
            {
                "id": found.id,
                "input": found.input,
                "prompt": found.prompt,
                "prompt_tokens": found.prompt_tokens,
                "prediction": found.prediction,
                "references": list(found.references),
            }
            for found in predictions
        ]
        stage.directory.save_predictions(name, task.name, lines)
    return {**keep(scores), "seconds": time.perf_counter() - started}


def judge(
    stage: Stage,
    task: Task,
    examples: Sequence[Example],
    metrics: Sequence[str],
    reserve: int,
    tell: Callable[[int, int], None],
    answers: Answers | None = None,
) -> tuple[dict[str, Score], list[Prediction]]:
    """Scores of the active tuning on examples, in the order of `metrics`, and its answers where those need some."""
    scores: dict[str, Score] = {}
    predictions: list[Prediction] = []
    own = [metric for metric in metrics if metric in MODEL_METRICS]
    named = [metric for metric in metrics if metric not in MODEL_METRICS]
    if own:
        rows = encode(stage, examples, reserve, task.name)
        with torch.no_grad():  # every rank scores all rows: the losses come as a whole
            scores |= inside(stage.base, lambda: losses(stage.base, rows, own))
    if named:
        predictions = _answer(stage, examples, task.max_new_tokens, reserve, tell, answers)
        scores |= measure(predictions, named)
    return {metric: scores[metric] for metric in metrics}, predictions


def encode(stage: Stage, examples: Sequence[Example], reserve: int, what: str) -> list[Encoded]:
    """Rows as they are trained on; says which prompts were cut."""
    cut: list[str] = []
    rows = encode_all(stage.encoder, examples, reserve, on_cut=lambda row: cut.append(row.id))
    if cut:
        stage.progress.say(
            f"{len(cut)} of {len(rows)} {what} prompts lost their middle to fit {stage.encoder.max_length} tokens: "
            f"{', '.join(cut[:3])}{' ...' if len(cut) > 3 else ''}"
        )
    return rows
