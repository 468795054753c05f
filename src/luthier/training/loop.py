"""The training loop: a plain function. Rows in, weights moved, a history out."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from luthier.encoding.batches import collate, micro_batches
from luthier.encoding.encoder import Encoded
from luthier.encoding.order import Stream, step_rows
from luthier.errors import Interrupted, UserError
from luthier.files import whole_file
from luthier.models.allocator import give_back_freed_memory
from luthier.models.base import BaseModel
from luthier.models.loss import loss_sum
from luthier.training.checkpoint import Progress, read_checkpoint, write_checkpoint
from luthier.training.optimizer import Optimizer
from luthier.training.settings import TrainingSettings
from luthier.tuning.files import copy_into
from luthier.tuning.method import Method, parameters

# Steps between returning the heap's holes to the system.
TRIM_EVERY = 4

Hook = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Validation:
    """Mean loss (nats per target token) and next-token accuracy on the validation targets."""

    loss: float
    accuracy: float


def train(
    base: BaseModel,
    name: str,
    rows: Stream,
    settings: TrainingSettings,
    seed: int,
    folder: Path,
    validate: Callable[[], Validation] | None = None,
    hooks: Sequence[Hook] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> Progress:
    """Train the attached tuning `name`; the base's own weights never move.

    Keeps the weights with the best validation loss. `folder` holds the checkpoint; one that is there is
    continued. Each step and each validation is told to `hooks` as a dict.
    Raises Interrupted after saving when `should_stop` says so, UserError for a loss that is not a number.
    """
    method: Method = base.methods[name]
    owned = parameters(base, name)
    peak = settings.learning_rate or method.defaults.learning_rate
    decay = method.defaults.weight_decay if settings.weight_decay is None else settings.weight_decay
    optimizer = Optimizer(owned, decay)
    steps = settings.steps(len(rows))
    validate_every = settings.validate_every or -(-len(rows) // settings.batch_size)
    checkpoint, best = folder / "checkpoint.safetensors", folder / "best.safetensors"

    torch.manual_seed(seed)
    progress = Progress()
    if checkpoint.is_file():
        progress, weights, state = read_checkpoint(checkpoint)
        copy_into(owned, weights, str(checkpoint))
        optimizer.restore(state)
        rows.restore(progress.stream)

    def tell(event: dict[str, Any]) -> None:
        progress.history.append(event)
        for hook in hooks:
            hook(event)

    base.use(name)
    while progress.step < steps:
        started = time.perf_counter()
        step = progress.step
        batch = step_rows(rows, settings.batch_size, step)
        loss, tokens = _accumulate(base, batch, settings.micro_batch_tokens)
        rate = settings.rate(step, steps, peak)
        norm = optimizer.step(rate, settings.clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"Training {name!r} broke at step {step + 1} of {steps}: the loss is {loss} and the gradient norm "
                f"{norm}. The rows of this step: {', '.join(row.id for row in batch)}. Lower training.learning_rate "
                f"(now {peak:g}), or look at these rows; an earlier checkpoint, if any, is kept in {folder}."
            )
        progress.step += 1
        if progress.step % TRIM_EVERY == 0:
            give_back_freed_memory()
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        progress.tokens += tokens
        event = {"step": progress.step, "steps": steps, "loss": loss, "rate": rate, "norm": norm}
        tell(event | {"tokens": tokens, "step_seconds": seconds})
        if validate and (progress.step % validate_every == 0 or progress.step == steps):
            _validate(base, name, progress, validate, best, tell)
            if settings.early_stopping and progress.without_gain >= settings.early_stopping:
                break
        stopping = should_stop()
        if stopping or (progress.step % settings.checkpoint_every == 0 and progress.step < steps):
            progress.stream = rows.state()
            write_checkpoint(checkpoint, progress, owned, optimizer.state())
        if stopping:
            raise Interrupted(
                f"Training {name!r} was stopped after step {progress.step} of {steps}; its state is saved."
            )
    if progress.best_step and progress.best_step != progress.step:
        copy_into(owned, load_file(best), str(best))
    return progress


def _accumulate(base: BaseModel, rows: list[Encoded], budget: int) -> tuple[float, int]:
    """Gradients of the mean loss over all targets of the batch, one micro-batch after another."""
    count = sum(len(row.labels) for row in rows)
    total, tokens = 0.0, 0
    for group in micro_batches(rows, budget, padded=not base.packs):
        batch = collate(group, base.decoder_start if base.encoder_decoder else None).to(base.device)
        loss = loss_sum(base, batch)
        (loss / count).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
        tokens += batch.tokens
    return total / count, tokens


def _validate(
    base: BaseModel,
    name: str,
    progress: Progress,
    validate: Callable[[], Validation],
    best: Path,
    tell: Callable[[dict[str, Any]], None],
) -> None:
    found = validate()
    progress.without_gain += 1
    if progress.best_loss is None or found.loss < progress.best_loss:
        progress.best_loss, progress.best_step, progress.without_gain = found.loss, progress.step, 0
        tensors = {key: parameter.detach().cpu().contiguous() for key, parameter in parameters(base, name).items()}
        with whole_file(best) as partial:
            save_file(tensors, partial)
    tell({"step": progress.step, "validation_loss": found.loss, "validation_accuracy": found.accuracy})
