"""What a stage scores: its tuning on the task's validation and test rows and on the retention tasks."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data.mixture import Mixture
from luthier.data.task import Example, Examples, Task
from luthier.directory import RunDirectory
from luthier.encoding.batches import encode_all
from luthier.encoding.encoder import Encoded, Encoder
from luthier.errors import Interrupted, UserError
from luthier.evaluation.kept import keep, keep_mean
from luthier.evaluation.score import answer, loss_and_accuracy, losses, measure, prompt_ids
from luthier.evaluation.speed import inference_cost
from luthier.metrics import MODEL_METRICS
from luthier.metrics.score import Score
from luthier.models.base import BaseModel
from luthier.progress import Progress
from luthier.recipe import Recipe
from luthier.training.loop import Validation


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


def validation_examples(stage: Stage, names: Sequence[str] | None = None) -> list[Example]:
    """The validation examples of these tasks, by default all."""
    return [one for task, examples in stage.tasks if not names or task.name in names for one in examples.validation]


def validate(stage: Stage, rows: list[Encoded], reserve: int, watch: str = "loss") -> Validation:
    """Loss on the validation targets, accuracy (of the answers where there are choices, else of the next token), and
    the metric that training watches.
    """
    loss, accuracy = loss_and_accuracy(stage.base, rows)
    scores: dict[str, float] = {}
    if watch not in ("loss", "accuracy"):
        longest = max(task.max_new_tokens for task, _ in stage.tasks)
        found = measure(
            answer(
                stage.base, stage.encoder, validation_examples(stage), longest, reserve, decoding=stage.recipe.decoding
            ),
            [watch],
        )
        scores[watch] = found[watch].value
    if isinstance(stage.recipe.task, Task) and stage.recipe.task.choices:
        answers = answer(stage.base, stage.encoder, validation_examples(stage), 1, reserve)
        accuracy = sum(one.prediction in one.references for one in answers) / len(answers)
    return Validation(loss, accuracy, scores)


def score_tasks(stage: Stage, name: str, reserve: int) -> dict[str, Any]:
    """Scores of the recipe's task; of a mixture, of each of its tasks and their mean."""
    scores = {task.name: _score(stage, name, task, examples.test, reserve) for task, examples in stage.tasks}
    if isinstance(stage.recipe.task, Mixture):
        judged = [(task.name, task.judged_by[-1]) for task in stage.recipe.tasks]
        scores[stage.recipe.task.name] = keep_mean(scores, judged)
    return scores


def request_cost(stage: Stage, name: str | None, reserve: int) -> dict[str, Any]:
    """What one request of the recipe's (first) task costs with the active tuning `name`, as `inference_cost` measures it."""
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
    scores: dict[str, Score] = {}
    own = [metric for metric in task.judged_by if metric in MODEL_METRICS]
    named = [metric for metric in task.judged_by if metric not in MODEL_METRICS]
    if own:
        scores |= losses(stage.base, encode(stage, examples, reserve, task.name), own)
    if named:
        answers = stage.directory.answers_so_far(name, task.name)
        predictions = answer(
            stage.base,
            stage.encoder,
            examples,
            task.max_new_tokens,
            reserve,
            tell,
            stage.recipe.decoding,
            answers.known(),
            answers.keep,
        )
        scores |= measure(predictions, named)
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
    in_order = {metric: scores[metric] for metric in task.judged_by}  # the last is the main one
    return {**keep(in_order), "seconds": time.perf_counter() - started}


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
