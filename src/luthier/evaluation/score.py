"""Scoring a base with its active tuning: validation loss, generated answers, answer choices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from luthier.data.task import Example
from luthier.encoding.batches import collate, collate_choices, micro_batches
from luthier.encoding.encoder import Encoded, Encoder, cut_middle
from luthier.evaluation.bootstrap import interval
from luthier.metrics import metric
from luthier.models.base import BaseModel
from luthier.models.generate import generate
from luthier.models.loss import label_scores

EVALUATION_TOKENS = 4096

Question = tuple[str, list[int], list[list[int]]]  # id, prompt ids, ids of each choice


@dataclass(frozen=True)
class Prediction:
    """What the model answered to one example."""

    id: str
    input: str  # the question alone
    prompt: str  # as the model read it, shots included
    prediction: str
    references: tuple[str, ...]
    prompt_tokens: int


def loss_and_accuracy(base: BaseModel, rows: Sequence[Encoded]) -> tuple[float, float]:
    """Mean cross-entropy (nats per target token) and next-token accuracy over all targets of the rows."""
    total, hits, count = 0.0, 0, 0
    for group in micro_batches(rows, EVALUATION_TOKENS, padded=not base.packs):
        batch = collate(group, base.decoder_start if base.encoder_decoder else None).to(base.device)
        scores, correct = label_scores(base, batch)
        total -= float(scores.double().sum())
        hits += int(correct.sum())
        count += len(scores)
    return total / count, hits / count


def losses(base: BaseModel, rows: Sequence[Encoded]) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """The report's entry for `loss`, and each row's mean cross-entropy (nats per target token)."""
    means: dict[str, float] = {}
    for group in micro_batches(rows, EVALUATION_TOKENS, padded=not base.packs):
        batch = collate(group, base.decoder_start if base.encoder_decoder else None).to(base.device)
        scores, _ = label_scores(base, batch)
        for row, piece in zip(group, torch.split(scores, [len(row.labels) for row in group]), strict=True):
            means[row.id] = -float(piece.double().mean())
    values = np.array([means[row.id] for row in rows])
    found = interval(values)
    signature = f"metric:loss|unit:nats/token|mean:rows|n:{len(rows)}|interval:bootstrap95"
    return {"value": found.value, "low": found.low, "high": found.high, "signature": signature}, values


def answer(
    base: BaseModel,
    encoder: Encoder,
    examples: Sequence[Example],
    max_new_tokens: int,
    reserve: int = 0,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> list[Prediction]:
    """Answer each example with the active tuning: by its choices where it has some, else by generating."""
    prompts = [_prompt(encoder, example, reserve + max_new_tokens) for example in examples]
    if all(example.choices for example in examples):
        texts = _choose(base, encoder, examples, prompts, tell)
    else:
        done = 0

        def finished(_: int, __: list[int]) -> None:
            nonlocal done
            done += 1
            tell(done, len(prompts))

        written = generate(base, prompts, max_new_tokens, encoder.stops, on_finished=finished)
        texts = [encoder.decode(ids) for ids in written]
    return [
        Prediction(example.id, example.prompt, encoder.prompt_text(example), text, example.references, len(prompt))
        for example, text, prompt in zip(examples, texts, prompts, strict=True)
    ]


def measure(predictions: Sequence[Prediction], names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Score predictions with each metric: (report entries by metric, per-example values by metric)."""
    entries, values = {}, {}
    texts = [prediction.prediction for prediction in predictions]
    references = [prediction.references for prediction in predictions]
    for name in names:
        measured = metric(name)(texts, references)
        found = interval(measured.values)
        entries[name] = {
            "value": found.value,
            "low": found.low,
            "high": found.high,
            "signature": f"{measured.signature}|n:{len(texts)}|interval:bootstrap95",
            **{part: float(np.mean(each)) for part, each in measured.parts.items()},
        }
        values[name] = measured.values
    return entries, values


def mean_of_tasks(scores: Sequence[tuple[dict[str, Any], str]]) -> dict[str, Any]:
    """The report's entry for a mixture: the mean over its tasks, each by its own metric, (scores, metric) a task.

    Each example's value is scaled so that the plain mean over all examples is the mean over the tasks.
    """
    each = [np.array(found["values"][metric]) for found, metric in scores]
    total = sum(map(len, each))
    values = np.concatenate([one * total / (len(each) * len(one)) for one in each])
    found = interval(values)
    signature = (
        f"metric:mean|of:{','.join(metric for _, metric in scores)}|tasks:{len(each)}|n:{total}|interval:bootstrap95"
    )
    return {
        "metrics": {"mean": {"value": found.value, "low": found.low, "high": found.high, "signature": signature}},
        "values": {"mean": [float(one) for one in values]},
        "seconds": sum(found["seconds"] for found, _ in scores),
    }


def _prompt(encoder: Encoder, example: Example, reserve: int) -> list[int]:
    room = encoder.max_length - (0 if encoder.encoder_decoder else reserve)
    return cut_middle(encoder.prompt_ids(example), room)


def _choose(
    base: BaseModel,
    encoder: Encoder,
    examples: Sequence[Example],
    prompts: Sequence[list[int]],
    tell: Callable[[int, int], None],
) -> list[str]:
    """The choice with the highest mean log-probability a token; each prompt is computed once."""
    rows: list[Question] = []
    for example, prompt in zip(examples, prompts, strict=True):
        choices = [encoder.target_ids(choice)[:-1] for choice in example.choices]
        if base.packs or base.encoder_decoder:
            rows.append((example.id, prompt, choices))
        else:  # rows cannot fork without packing: every choice brings its own prompt
            rows += [(example.id, prompt, [choice]) for choice in choices]
    scores: list[list[float]] = [[] for _ in rows]
    for places in _groups(rows, EVALUATION_TOKENS):
        for place, found in zip(places, _choice_scores(base, [rows[place] for place in places]), strict=True):
            scores[place] = found
        tell(sum(map(bool, scores)), len(rows))
    flat = iter([score for row in scores for score in row])
    return [example.choices[int(np.argmax([next(flat) for _ in example.choices]))] for example in examples]


def _choice_scores(base: BaseModel, rows: list[Question]) -> list[list[float]]:
    """Mean log-probability a token of each choice of each row."""
    batch, places = collate_choices(rows, base.decoder_start if base.encoder_decoder else None)
    scores, _ = label_scores(base, batch.to(base.device))
    lengths = [len(choice) for _, _, choices in rows for choice in choices]
    found: list[list[float]] = [[] for _ in rows]
    for (place, _), piece in zip(places, torch.split(scores, lengths), strict=True):
        found[place].append(float(piece.mean()))
    return found


def _groups(rows: Sequence[Question], budget: int) -> list[list[int]]:
    sizes = [len(prompt) + sum(map(len, choices)) for _, prompt, choices in rows]
    groups: list[list[int]] = []
    total = 0
    for place in sorted(range(len(rows)), key=lambda place: -sizes[place]):
        if not groups or total + sizes[place] > budget:
            groups.append([])
            total = 0
        groups[-1].append(place)
        total += sizes[place]
    return groups
