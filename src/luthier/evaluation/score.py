"""Scoring a base with its active tuning: validation loss, generated answers, answer choices."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from luthier.data.task import ChoiceScoring, Example
from luthier.encoding.batches import collate, collate_choices, micro_batches
from luthier.encoding.encoder import Encoded, Encoder, cut_middle
from luthier.metrics import MODEL_METRICS, metric
from luthier.metrics.score import Score
from luthier.models.base import BaseModel
from luthier.models.decoding import Decoding
from luthier.models.generate import GREEDY, batches_by_length, generate
from luthier.models.grafted import standing_still
from luthier.models.loss import label_scores

EVALUATION_TOKENS = 4096

Question = tuple[str, list[int], list[list[int]]]  # id, prompt ids, ids of each choice
# Applies a function to all batches of places, some of them in other processes: a list of answers for each batch.
Gathered = Callable[[Callable[[Sequence[list[int]]], list[list[str]]], Sequence[list[int]]], list[list[str]]]


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
    for group in micro_batches(rows, EVALUATION_TOKENS, padded=base.pads):
        batch = collate(group, base.decoder_start if base.encoder_decoder else None, base.forks).to(base.device)
        scores, correct = label_scores(base, batch)
        total -= float(scores.double().sum())
        hits += int(correct.sum())
        count += len(scores)
    return total / count, hits / count


def losses(base: BaseModel, rows: Sequence[Encoded], names: Sequence[str] = ("loss",)) -> dict[str, Score]:
    """The metrics that come from the model itself (loss, perplexity), over the targets of each row."""
    nats: dict[str, float] = {}
    for group in micro_batches(rows, EVALUATION_TOKENS, padded=base.pads):
        batch = collate(group, base.decoder_start if base.encoder_decoder else None, base.forks).to(base.device)
        scores, _ = label_scores(base, batch)
        for row, piece in zip(group, torch.split(scores, [len(row.labels) for row in group]), strict=True):
            nats[row.id] = -float(piece.double().sum())
    surprise, tokens = [nats[row.id] for row in rows], [len(row.labels) for row in rows]
    return {name: MODEL_METRICS[name].score(surprise, tokens) for name in names}


def answer(
    base: BaseModel,
    encoder: Encoder,
    examples: Sequence[Example],
    max_new_tokens: int,
    reserve: int = 0,
    tell: Callable[[int, int], None] = lambda done, of: None,
    decoding: Decoding = GREEDY,
    known: Mapping[int, str] | None = None,
    keep: Callable[[dict[int, str]], None] = lambda found: None,
    gathered: Gathered = lambda function, batches: function(batches),
    choice_scoring: ChoiceScoring = "mean",
) -> list[Prediction]:
    """Answer each example with the active tuning: by its choices where it has some, else by generating.

    Answers are given to `keep` batch by batch, by the example's place; batches whose answers are all `known` from before
    are not computed again. The batches are always the same, so what is computed depends neither on what was known nor on
    how they are divided over processes (`gathered`).
    """
    choices = bool(examples) and all(example.choices for example in examples)
    longest = max((longest_choice(encoder, example) for example in examples), default=0) if choices else max_new_tokens
    prompts = [prompt_ids(encoder, example, reserve + longest) for example in examples]
    texts = dict(known or {})
    if choices:
        batches = by_size(base, encoder, examples, prompts)
    else:
        batches = batches_by_length(prompts, decoding.batch_size, base.device.type)

    def answers(own: Sequence[list[int]]) -> list[list[str]]:
        every = sum(map(len, own))
        done = sum(place in texts for places in own for place in places)
        for places in own:
            if not all(place in texts for place in places):
                done -= sum(place in texts for place in places)
                if choices:
                    asked = [examples[place] for place in places]
                    found = _choose(base, encoder, asked, [prompts[place] for place in places], choice_scoring)
                else:
                    chosen = [prompts[place] for place in places]
                    found = _write(base, encoder, chosen, places, max_new_tokens, decoding, done, every, tell)
                new = dict(zip(places, found, strict=True))
                keep(new)
                texts.update(new)
                done += len(places)
            tell(done, every)
        return [[texts[place] for place in places] for places in own]

    with standing_still():
        answered = gathered(answers, batches)
    for places, found in zip(batches, answered, strict=True):
        texts |= zip(places, found, strict=True)
    return [
        Prediction(
            example.id,
            example.prompt,
            encoder.prompt_text(example),
            texts[place],
            example.references,
            len(prompts[place]),
        )
        for place, example in enumerate(examples)
    ]


def measure(predictions: Sequence[Prediction], names: Sequence[str]) -> dict[str, Score]:
    """Score predictions with each metric."""
    texts = [prediction.prediction for prediction in predictions]
    references = [prediction.references for prediction in predictions]
    return {name: metric(name).score(texts, references) for name in names}


def prompt_ids(encoder: Encoder, example: Example, reserve: int) -> list[int]:
    """A prompt as the model reads it, with `reserve` positions left free of the encoder's limit."""
    room = encoder.max_length - (0 if encoder.encoder_decoder else reserve)
    return cut_middle(encoder.prompt_ids(example), room)


def longest_choice(encoder: Encoder, example: Example) -> int:
    """Tokens of an example's longest answer choice."""
    return max(len(encoder.target_ids(choice)) for choice in example.choices)


def _write(
    base: BaseModel,
    encoder: Encoder,
    prompts: Sequence[list[int]],
    places: list[int],
    max_new_tokens: int,
    decoding: Decoding,
    before: int,
    of: int,
    tell: Callable[[int, int], None],
) -> list[str]:
    """Generate the answers of one batch; `before` answers `of` so many are there already."""
    done = before

    def finished(_: int, __: list[int]) -> None:
        nonlocal done
        done += 1
        tell(done, of)

    written = generate(
        base, prompts, max_new_tokens, encoder.stops, on_finished=finished, decoding=decoding, places=places
    )
    return [encoder.decode(ids) for ids in written]


def _choose(
    base: BaseModel, encoder: Encoder, examples: Sequence[Example], prompts: Sequence[list[int]], by: ChoiceScoring
) -> list[str]:
    """The choice with the highest mean (or sum) of its tokens' log-probabilities; each prompt is computed once."""
    flat = iter(
        [score for row in _choice_scores(base, questions(base, encoder, examples, prompts), by) for score in row]
    )
    return [example.choices[int(np.argmax([next(flat) for _ in example.choices]))] for example in examples]


def questions(
    base: BaseModel, encoder: Encoder, examples: Sequence[Example], prompts: Sequence[list[int]]
) -> list[Question]:
    """Examples with their choices as they are scored together."""
    rows: list[Question] = []
    for example, prompt in zip(examples, prompts, strict=True):
        choices = [encoder.target_ids(choice)[:-1] for choice in example.choices]
        if base.packs or base.encoder_decoder:
            rows.append((example.id, prompt, choices))
        else:  # rows cannot fork without packing: every choice brings its own prompt
            rows += [(example.id, prompt, [choice]) for choice in choices]
    return rows


def _choice_scores(base: BaseModel, rows: list[Question], by: ChoiceScoring) -> list[list[float]]:
    """Mean or summed log-probability of the tokens of each choice of each row."""
    batch, places = collate_choices(rows, base.decoder_start if base.encoder_decoder else None)
    scores, _ = label_scores(base, batch.to(base.device))
    lengths = [len(choice) for _, _, choices in rows for choice in choices]
    found: list[list[float]] = [[] for _ in rows]
    for (place, _), piece in zip(places, torch.split(scores, lengths), strict=True):
        found[place].append(float(piece.mean() if by == "mean" else piece.sum()))
    return found


def by_size(
    base: BaseModel, encoder: Encoder, examples: Sequence[Example], prompts: Sequence[list[int]]
) -> list[list[int]]:
    """Which questions with choices are scored together, the longest first: as many as the tokens' budget holds."""
    sizes = []
    for example, prompt in zip(examples, prompts, strict=True):
        answers = sum(len(encoder.target_ids(choice)) - 1 for choice in example.choices)
        copies = 1 if base.packs or base.encoder_decoder else len(example.choices)
        sizes.append(len(prompt) * copies + answers)
    groups: list[list[int]] = []
    total = 0
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        if not groups or total + sizes[place] > EVALUATION_TOKENS:
            groups.append([])
            total = 0
        groups[-1].append(place)
        total += sizes[place]
    return groups
