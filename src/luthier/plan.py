"""What will it cost? Memory by part, time and disk of every tuning of a recipe, before any weight is read.

    peak = live(t) at its largest + PROCESS + SLACK x activations

`live` is counted, not estimated: the real forward and backward pass runs dry (`models/dry_run.py`) on the largest
micro-batch under a `Ledger`. What a ledger cannot see are the two constants: libraries and the products' buffers, and
the holes that the C allocator leaves between tensors. They were fitted on ten configurations on a CPU.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from luthier.encoding.batches import collate, micro_batches
from luthier.encoding.encoder import Encoded
from luthier.encoding.order import step_rows
from luthier.evaluation.score import EVALUATION_TOKENS
from luthier.models.base import BaseModel
from luthier.models.dry_run import dry_run
from luthier.models.ledger import Ledger
from luthier.models.load import resolve_device, resolve_dtype
from luthier.models.loss import label_scores, loss_sum
from luthier.models.quantize import QuantizedLinear
from luthier.models.recompute import recomputed
from luthier.recipe import Recipe
from luthier.training.optimizer import state_bytes
from luthier.training.settings import TrainingSettings
from luthier.training_rows import training_rows
from luthier.tuning import Method, attach, parameters

PROCESS, SLACK = 80_000_000, 0.3
# More training rows than this are not encoded for a plan; so many steps are looked at for the largest micro-batch.
FEW_ROWS, STEPS = 20_000, 500
PARTS = ("weights", "gradients", "optimizer states", "activations", "logits", "workspace")


@dataclass(frozen=True)
class Choice:
    """A setting that lowers the peak, and the peak (bytes) it would give."""

    change: str
    peak_bytes: int


@dataclass(frozen=True)
class TuningPlan:
    """One tuning: bytes of each part at the peak, which phase that is in, seconds, bytes on disk, and what to change."""

    method: str
    parts: dict[str, int]
    phases: dict[str, int]  # the peak of each phase
    phase: str
    peak_bytes: int
    seconds: float  # of training's matrix products alone, at the measured rate
    file_bytes: int
    rows: str  # where the lengths of the rows come from
    available_bytes: int
    fits: bool
    choices: list[Choice]


@dataclass(frozen=True)
class _Load:
    """The largest micro-batch, whether a step has several, and the tokens of the whole training."""

    group: list[Encoded]
    several: bool
    tokens: int
    said: str


def plan(recipe: Recipe, available: int | None = None) -> dict[str, TuningPlan]:
    """The plan of each tuning; `available` is the memory (bytes) that counts, by default what this machine has free.

    Raises UserError as a run's start does. Reads configuration, tokenizer and rows, never weights.
    """
    room = available_bytes() if available is None else available
    return {name: _plan(recipe, name, room) for name in recipe.tunings}


def available_bytes() -> int:
    """Memory that is free now: the accelerator's, else the machine's."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = dict(line.split(":") for line in open("/proc/meminfo", encoding="ascii"))  # noqa: SIM115
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _plan(recipe: Recipe, name: str, room: int) -> TuningPlan:
    first = _once(recipe, name)
    if first.peak_bytes <= room:
        return replace(first, available_bytes=room, fits=True)
    choices = []
    for change, other in _changes(recipe, name):
        peak = _once(other, name).peak_bytes
        if peak < first.peak_bytes:
            choices.append(Choice(change, peak))
    return replace(first, available_bytes=room, fits=False, choices=choices)


def _changes(recipe: Recipe, name: str) -> list[tuple[str, Recipe]]:
    """Settings that may lower the peak, the cheapest first."""
    tuning = recipe.tunings[name]
    settings = tuning.training
    training = lambda **new: recipe.model_copy(  # noqa: E731
        update={
            "tunings": {**recipe.tunings, name: tuning.model_copy(update={"training": replace(settings, **new)})},
        }
    )
    found: list[tuple[str, Recipe]] = []
    if isinstance(tuning.method, Method):
        small = max(64, settings.micro_batch_tokens // 4)
        found = [(f"training.micro_batch_tokens={small}", training(micro_batch_tokens=small))]
        if not settings.gradient_checkpointing:
            found.append(("training.gradient_checkpointing=true", training(gradient_checkpointing=True)))
        if settings.optimizer == "adamw":
            found.append(("training.optimizer=adafactor", training(optimizer="adafactor")))
    half = max(16, recipe.max_length // 2)
    shorter = recipe.model_copy(update={"max_length": half})
    shorter._encoder = None  # it was made for the longer rows
    found.append((f"max_length={half}", shorter))
    return found


def _once(recipe: Recipe, name: str) -> TuningPlan:
    device = resolve_device(recipe.base.device)
    dtype = resolve_dtype(recipe.base.dtype, device)
    base = BaseModel.skeleton(recipe.base, dtype)
    method = recipe.method(name)
    settings = recipe.tunings[name].training
    trained = isinstance(method, Method)
    if isinstance(method, Method):
        attach(base, name, method, recipe.seed)
        base.use(name)
    owned = parameters(base, name) if trained else {}
    load = _rows(recipe, name, base, method.virtual_tokens() if isinstance(method, Method) else 0)
    with dry_run(base, device):
        counted: dict[str, Counter[str]] = {}
        products = 0
        if trained:
            counted["training"], products = _training(base, owned, load, settings)
        counted["validation"] = _validation(base, owned, load, settings)
    weights = counted["validation"]["weights"]
    counted["loading"] = Counter({"weights": weights})
    phases = {phase: _with_unseen(parts) for phase, parts in counted.items()}
    phase = max(phases, key=lambda one: phases[one])
    parts = {part: counted[phase][part] for part in PARTS}
    parts["workspace"] += phases[phase] - sum(parts.values())
    per_token = products / max(1, sum(map(len, load.group)))
    return TuningPlan(
        method=method.method, parts=parts, phases=phases, phase=phase, peak_bytes=phases[phase],
        seconds=per_token * load.tokens / matrix_rate(dtype, device) if trained else 0.0,
        file_bytes=sum(tensor.numel() * tensor.dtype.itemsize for tensor in owned.values()),
        rows=load.said, available_bytes=0, fits=True, choices=[],
    )  # fmt: skip


def _with_unseen(parts: Counter[str]) -> int:
    return int(sum(parts.values()) + PROCESS + SLACK * parts["activations"])


def _rows(recipe: Recipe, name: str, base: BaseModel, reserve: int) -> _Load:
    """The largest micro-batch of the training rows; of rows of `max_length` where they are too many or streamed."""
    settings, encoder = recipe.tunings[name].training, recipe.read_encoder()
    tasks = [(task, recipe.examples(task)) for task in recipe.tasks]
    padded = not base.packs
    if all(each.stream is None and 0 < len(each.train) <= FEW_ROWS for _, each in tasks):
        stream, _ = training_rows(recipe, recipe.tunings[name], tasks, encoder, reserve)
        steps = settings.steps(len(stream))
        worst: tuple[tuple[int, int], list[Encoded], bool] | None = None
        tokens = seen = 0
        for step in range(min(steps, STEPS)):
            groups = micro_batches(step_rows(stream, settings.batch_size, step), settings.micro_batch_tokens, padded)
            seen += 1
            for group in groups:
                tokens += sum(map(len, group))
                cost = len(group) * len(group[0]) if padded else sum(map(len, group))
                size = (cost, sum(len(row) ** 2 for row in group))
                if worst is None or size > worst[0]:
                    worst = size, group, len(groups) > 1
        assert worst is not None
        return _Load(worst[1], worst[2], tokens * steps // seen, "the training rows")
    target = max(1, encoder.max_length // 4)
    row = Encoded("longest", [0] * (encoder.max_length - target), [0] * target)
    rows = [row] * settings.batch_size
    groups = micro_batches(rows, settings.micro_batch_tokens, padded)
    steps = settings.steps(sum(len(each.train) for _, each in tasks if each.stream is None) or settings.batch_size)
    return _Load(groups[0], len(groups) > 1, steps * sum(map(len, rows)), f"rows of max_length ({encoder.max_length})")


def _hold_weights(base: BaseModel, owned: dict[str, Any], ledger: Ledger) -> None:
    packed = {path: one for path, one in base.grafts.modules.items() if isinstance(one, QuantizedLinear)}
    stand_ins = {f"{path}.weight" for path in packed}
    ledger.hold([tensor for key, tensor in base.grafts.originals.items() if key not in stand_ins], "weights")
    for one in packed.values():
        ledger.hold([one.packed, one.state.absmax], "weights")
    ledger.hold([*base.model.buffers(), *owned.values()], "weights")


def _training(
    base: BaseModel, owned: dict[str, Any], load: _Load, settings: TrainingSettings
) -> tuple[Counter[str], int]:
    """Bytes by part at the peak of a step, and the operations of the products of its largest micro-batch."""
    ledger = Ledger()
    with ledger:
        _hold_weights(base, owned, ledger)
        if load.several:  # an earlier micro-batch has left its gradients
            for parameter in owned.values():
                parameter.grad = torch.zeros_like(parameter)
        _mark_gradients(owned, ledger)
        ledger.restart()
        with (
            _parts(base, ledger),
            recomputed(base.model) if settings.gradient_checkpointing else nullcontext(),
        ):
            loss = loss_sum(base, _batch(base, load.group), settings.label_smoothing)
            ledger.part = "activations"
            loss.backward()  # type: ignore[no-untyped-call]
    for parameter in owned.values():
        parameter.grad = None
    found = Counter(ledger.at_peak)
    found["optimizer states"] = state_bytes(owned.values(), settings.optimizer)
    return found, sum(products for products, _ in ledger.work)


def _mark_gradients(owned: dict[str, Any], ledger: Ledger) -> None:
    for parameter in owned.values():
        ledger.hold([parameter.grad], "gradients")
        parameter.register_post_accumulate_grad_hook(lambda one: ledger.hold([one.grad], "gradients"))


def _validation(base: BaseModel, owned: dict[str, Any], load: _Load, settings: TrainingSettings) -> Counter[str]:
    """Bytes by part at the peak of scoring as many rows as the training rows' longest give one evaluation batch."""
    ledger = Ledger()
    longest = max(load.group, key=len)
    rows = [longest] * max(1, EVALUATION_TOKENS // max(1, len(longest)))
    with ledger:
        _hold_weights(base, owned, ledger)
        ledger.restart()
        with _parts(base, ledger):
            label_scores(base, _batch(base, rows))
    found = Counter(ledger.at_peak)
    found["optimizer states"] = state_bytes(owned.values(), settings.optimizer)
    return found


def _batch(base: BaseModel, rows: Sequence[Encoded]) -> Any:
    return collate(rows, base.decoder_start if base.encoder_decoder else None).to(base.device)


class _parts:
    """Within it tensors are activations until the head runs, and logits from there on."""

    def __init__(self, base: BaseModel, ledger: Ledger):
        self.head, self.ledger = base.model.get_output_embeddings(), ledger

    def __enter__(self) -> None:
        self.ledger.part = "activations"
        turn: Callable[..., None] = lambda *_: setattr(self.ledger, "part", "logits")  # noqa: E731
        self.handle = self.head.register_forward_pre_hook(turn)

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a 512^3 product on this machine: the best of a few, in about 50 ms."""
    a: Tensor = torch.ones(512, 512, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * 512**3 / best


__all__ = ["Choice", "TuningPlan", "available_bytes", "matrix_rate", "plan"]
