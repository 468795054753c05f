"""The training loop: a plain function. Rows in, weights moved, a history out."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from luthier.encoding.batches import collate, micro_batches
from luthier.encoding.encoder import Encoded
from luthier.encoding.order import Stream, step_rows
from luthier.errors import Interrupted, MemoryRanOut, UserError
from luthier.files import remove_partial
from luthier.models.allocator import give_back_freed_memory
from luthier.models.base import BaseModel
from luthier.models.loss import loss_sum
from luthier.models.recompute import recomputed
from luthier.models.shard import inside, locals_of, read_parts
from luthier.models.tensor_file import write_tensors
from luthier.training.checkpoint import Progress, read_checkpoint, write_checkpoint
from luthier.training.gradients import made_early
from luthier.training.loss_scale import first_scale, grown
from luthier.training.optimizer import Optimizer
from luthier.training.ranks import ALONE, Ranks
from luthier.training.rates import rate_factors
from luthier.training.settings import TrainingSettings
from luthier.tuning.files import copy_into
from luthier.tuning.method import Method, parameters

# Steps between returning the heap's holes to the system.
TRIM_EVERY = 16
# No budget is halved below this: rows are longer.
SMALLEST_BUDGET = 64

Hook = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Validation:
    """Mean loss (nats per target token), next-token accuracy on the validation targets, and scores by metric."""

    loss: float
    accuracy: float
    scores: Mapping[str, float] = field(default_factory=dict)

    def of(self, watch: str) -> float:
        """The value that `training.watch` names, the more the better."""
        return -self.loss if watch == "loss" else self.accuracy if watch == "accuracy" else self.scores[watch]


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
    ranks: Ranks = ALONE,
) -> Progress:
    """Train the attached tuning `name`; the base's own weights never move.

    Of several `ranks` each runs its share of every batch, and rank 0 alone writes.

    Keeps the weights with the best of what `settings.watch` names. `folder` holds the checkpoint; one that is there is
    continued. Each step and each validation is told to `hooks` as a dict.
    Raises Interrupted after saving when `should_stop` says so, UserError for a loss that is not a number.
    """
    method: Method = base.methods[name]
    owned = parameters(base, name)
    peak = settings.learning_rate or method.defaults.learning_rate
    decay = method.defaults.weight_decay if settings.weight_decay is None else settings.weight_decay
    optimizer = Optimizer(owned, decay, settings.optimizer, rate_factors(owned, settings, base.blocks), ranks)
    steps = settings.steps(len(rows))
    validate_every = settings.validate_every or -(-len(rows) // settings.batch_size)
    checkpoint, best = folder / "checkpoint.safetensors", folder / "best.safetensors"
    check_ranks(settings, ranks.size)
    if ranks.rank == 0:
        for path in (checkpoint, best):
            remove_partial(path)

    torch.manual_seed(seed)
    budget = settings.token_budget(base.device.type, base.blocks * base.width)
    progress = Progress(micro_batch_tokens=budget, loss_scale=first_scale(base.dtype))
    if checkpoint.is_file():
        progress, weights, state = read_checkpoint(checkpoint, owned)
        copy_into(locals_of(owned), weights, str(checkpoint))
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
        if ranks.size > 1:
            torch.manual_seed(ranks.seed(seed, step))
        loss, tokens = _gradients(base, name, batch, settings, progress, tell, ranks)
        rate = settings.rate(step, steps, peak)
        norm = optimizer.step(rate, settings.clip, progress.loss_scale)
        if progress.loss_scale > 1 and not math.isfinite(norm):
            progress.loss_scale, progress.good_steps = progress.loss_scale / 2, 0
            tell({"step": step + 1, "loss_scale": progress.loss_scale})
            continue
        progress.good_steps += 1
        progress.loss_scale = grown(progress.loss_scale, progress.good_steps)
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
        progress.tokens += int(tokens)
        event = {"step": progress.step, "steps": steps, "loss": loss, "rate": rate, "norm": norm}
        tell(event | {"tokens": int(tokens), "step_seconds": seconds})
        if validate and (progress.step % validate_every == 0 or progress.step == steps):
            _validate(base, name, progress, validate, settings.watch, best, tell, ranks)
            if settings.early_stopping and progress.without_gain >= settings.early_stopping:
                break
        stopping = ranks.any(should_stop())
        if stopping or (progress.step % settings.checkpoint_every == 0 and progress.step < steps):
            progress.stream = rows.state()
            write_checkpoint(checkpoint, progress, owned, optimizer.state(), writes=ranks.rank == 0)
        if stopping:
            ranks.wait()  # until it is written
            raise Interrupted(
                f"Training {name!r} was stopped after step {progress.step} of {steps}; its state is saved."
            )
    if progress.best_step and progress.best_step != progress.step:
        copy_into(locals_of(owned), read_parts(best, owned.get)[1], str(best))
    return progress


def check_ranks(settings: TrainingSettings, size: int) -> None:
    """Raise UserError for settings with which so many processes cannot train."""
    if size > settings.batch_size:
        raise UserError(
            f"training.batch_size is {settings.batch_size} for {size} processes: each needs at least a row of every step. "
            f"Set it to {size} or more, or start fewer processes."
        )


def _gradients(
    base: BaseModel,
    name: str,
    rows: list[Encoded],
    settings: TrainingSettings,
    progress: Progress,
    tell: Hook,
    ranks: Ranks = ALONE,
) -> tuple[float, float]:
    """Gradients of one optimizer batch, of all ranks: the mean loss and the tokens run. Halves the budget where asked and
    needed.
    """
    start = torch.get_rng_state(), torch.cuda.get_rng_state() if base.device.type == "cuda" else None
    base.embedding_noise = settings.neftune
    early = parameters(base, name).values() if base.on_cpu and not base.sharded else ()
    try:
        with recomputed(base.model, settings.gradient_checkpointing):
            while True:
                try:
                    with made_early(early):
                        found = accumulate(
                            base,
                            rows,
                            progress.micro_batch_tokens,
                            settings.label_smoothing,
                            ranks,
                            progress.loss_scale,
                        )
                    break
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    if not out_of_memory(error):
                        raise
                    smaller = progress.micro_batch_tokens // 2
                    if not settings.halve_out_of_memory or smaller < SMALLEST_BUDGET:
                        raise MemoryRanOut(_advice(name, rows, progress.micro_batch_tokens, settings)) from None
                progress.micro_batch_tokens = smaller
                tell({"step": progress.step + 1, "micro_batch_tokens": smaller})
                for parameter in parameters(base, name).values():
                    parameter.grad = None
                torch.set_rng_state(start[0])
                if start[1] is not None:
                    torch.cuda.set_rng_state(start[1])
                    torch.cuda.empty_cache()
    finally:
        base.embedding_noise = 0.0
    if settings.halve_out_of_memory:  # a checkpoint is rank 0's: all go on with what fits the smallest
        progress.micro_batch_tokens = ranks.least(progress.micro_batch_tokens)
    ranks.add_gradients(parameters(base, name))
    loss, tokens = ranks.add(*found)
    return loss, tokens


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on an accelerator an error of its own, on a CPU one by its text."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _advice(name: str, rows: list[Encoded], budget: int, settings: TrainingSettings) -> str:
    longest = max(rows, key=len)
    steps = [] if settings.halve_out_of_memory else ["halve_out_of_memory: true"]
    steps += [f"micro_batch_tokens below {budget}"] if budget > len(longest) else []
    steps += [] if settings.gradient_checkpointing == 1 else ["gradient_checkpointing: true"]
    return (
        f"Training {name!r} ran out of memory with micro-batches of {budget} tokens (the longest row of this step, "
        f"{longest.id}, has {len(longest)}). Set in `training`: {'; '.join(steps) or 'nothing is left there'}; or lower "
        "`max_length`, or quantize the base. What was saved is kept: continue with --resume."
    )


def accumulate(
    base: BaseModel,
    rows: list[Encoded],
    budget: int,
    label_smoothing: float = 0.0,
    ranks: Ranks = ALONE,
    loss_scale: float = 1.0,
) -> tuple[float, int]:
    """Gradients of the mean loss over all targets of the batch, one micro-batch of this rank's rows after another.

    They are multiplied by `loss_scale`. Returns this rank's part of the mean loss, and its tokens.
    """
    count = sum(len(row.labels) for row in rows)
    total, tokens = 0.0, 0
    groups = [micro_batches(part, budget, padded=base.pads) for part in ranks.split(rows)]
    most = max(groups, key=len)
    own = [(group, 1.0) for group in groups[ranks.rank]]
    if base.sharded:  # every rank has to run the blocks as often as the others: for nothing, where it has no more rows
        own += [(most[0], 0.0)] * (len(most) - len(own))
    for group, counts in own:
        batch = collate(group, base.decoder_start if base.encoder_decoder else None, base.forks).to(base.device)
        loss = inside(base, lambda batch=batch: loss_sum(base, batch, label_smoothing))  # type: ignore[misc]
        (loss * (counts * loss_scale / count)).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach()) * counts
        del loss  # and with it the graph, whose memory the next one takes
        tokens += sum(map(len, group)) if counts else 0
    return total / count, tokens


def _validate(
    base: BaseModel,
    name: str,
    progress: Progress,
    validate: Callable[[], Validation],
    watch: str,
    best: Path,
    tell: Callable[[dict[str, Any]], None],
    ranks: Ranks,
) -> None:
    found = validate()
    progress.without_gain += 1
    if progress.best is None or found.of(watch) > progress.best:
        progress.best, progress.best_step, progress.without_gain = found.of(watch), progress.step, 0
        write_tensors(best, parameters(base, name), writes=ranks.rank == 0)
    scores = {f"validation_{metric}": value for metric, value in found.scores.items()}
    tell({"step": progress.step, "validation_loss": found.loss, "validation_accuracy": found.accuracy, **scores})
