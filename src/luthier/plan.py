"""What will it cost? Memory by part, time and disk of every tuning of a recipe, before any weight is read.

    peak = what was there before + what the heap holds at its most + what libraries keep

Nothing of it is estimated from sizes of a model: the code of each phase runs dry (`models/dry_run.py`) under a `Ledger` on the
largest rows that the stage will run (`work.py`, `phases.py`), and each tensor takes its place in a `Heap` (`models/heap.py`).
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from luthier import phases
from luthier.errors import UserError
from luthier.models.base import BaseModel
from luthier.models.dry_run import dry_run
from luthier.models.load import how_stored, resolve_device, resolve_dtype
from luthier.recipe import Recipe
from luthier.training.settings import TrainingSettings
from luthier.tuning import Full, Interpolation, LoRA, Method, Selective, attach, parameters
from luthier.work import Work

PARTS = ("weights", "gradients", "optimizer states", "activations", "logits", "caches", "workspace")

# A change that leaves more than this share of the peak is not worth its mention.
WORTH = 0.99


@dataclass(frozen=True)
class Choice:
    """A setting that lowers the peak, and the peak (bytes) it would give."""

    change: str
    peak_bytes: int


@dataclass(frozen=True)
class TuningPlan:
    """One tuning: the bytes of each part in each phase when it holds the most, seconds, bytes on disk, what to change."""

    method: str
    phases: dict[str, dict[str, int]]
    phase: str  # the one with the peak
    peak_bytes: int
    seconds: float  # of training's matrix products alone, at the measured rate
    file_bytes: int
    rows: str  # where the lengths of the training rows come from
    available_bytes: int
    fits: bool
    choices: list[Choice]

    def measured_phase(self) -> str:
        """The phase that holds the most of those that a stage measures: where it has a tuning, until answers are written."""
        answers = "training" not in self.phases and "interpolating" not in self.phases
        covered = {
            phase: sum(parts.values()) for phase, parts in self.phases.items() if phase != "answering" or answers
        }
        return max(covered, key=lambda phase: covered[phase])


def plan(recipe: Recipe, available: int | None = None) -> dict[str, TuningPlan]:
    """The plan of each tuning; `available` is the memory (bytes) that counts, by default what this machine has free.

    Raises UserError as a run's start does. Reads configuration, tokenizer and rows, never weights.
    """
    room = available_bytes() if available is None else available
    return {name: _plan(recipe, name, room) for name in recipe.tunings}


def advised(recipe: Recipe, name: str) -> str:
    """The settings that lower a tuning's peak, for whom memory ran out; empty where the base's code does not run dry."""
    try:
        found = _plan(recipe, name, room=0)
    except Exception:  # who ran out of memory is to read that
        return ""
    said = f"The plan of {name!r} is {found.peak_bytes / 1e9:.2f} GB in {found.phase}"
    if not found.choices:
        return f"{said}, and no setting lowers it."
    lines = [f"  --set {one.change}: {one.peak_bytes / 1e9:.2f} GB" for one in found.choices]
    return "\n".join([f"{said}. What lowers it (`luthier plan`):", *lines])


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
    first, work = _once(recipe, name)
    if first.peak_bytes <= room:
        return replace(first, available_bytes=room, fits=True)
    choices, helped = [], []
    for change in _changes(recipe, name, work):
        if (peak := _peak(recipe, name, [change], work)) is not None and peak < WORTH * first.peak_bytes:
            choices.append(Choice(change.said, peak))
            helped.append(change)
    together = [change for change in helped if change.keeps_method]
    if len(together) > 1 and min(one.peak_bytes for one in choices) > room:
        peak = _peak(recipe, name, together, work)
        if peak is not None:
            choices.append(Choice(" --set ".join(change.said for change in together), peak))
    return replace(first, available_bytes=room, fits=False, choices=choices)


def _peak(recipe: Recipe, name: str, changes: Sequence["_Change"], work: Work) -> int | None:
    """The peak with these changes; None where this method, or this base, cannot be had so."""
    for change in changes:
        recipe = change.made(recipe)
    try:
        return _once(recipe, name, None if any(change.of_rows for change in changes) else work)[0].peak_bytes
    except UserError:
        return None


@dataclass(frozen=True)
class _Change:
    said: str
    made: Callable[[Recipe], Recipe]
    of_rows: bool = False  # the rows that run together are others
    keeps_method: bool = True


def _changes(recipe: Recipe, name: str, work: Work) -> list[_Change]:
    """Settings that may lower the peak, those that change the result least first."""
    tuning = recipe.tunings[name]

    def changed(recipe: Recipe, **new: Any) -> Recipe:
        one = recipe.tunings[name].model_copy(update=new)
        return recipe.model_copy(update={"tunings": {**recipe.tunings, name: one}})

    def trained(key: str, value: Any, recipe: Recipe) -> Recipe:
        return changed(recipe, training=replace(recipe.tunings[name].training, **{key: value}))

    found: list[_Change] = []
    if together := len(work.prompts) // 4:
        fewer = replace(recipe.decoding, batch_size=together)
        said = f"decoding.batch_size={together}"
        found.append(_Change(said, lambda recipe: recipe.model_copy(update={"decoding": fewer}), of_rows=True))
    if isinstance(tuning.method, Method):
        for key, value in _cheaper(tuning.training, resolve_device(recipe.base.device)).items():
            said = f"training.{key}={str(value).lower()}"
            found.append(_Change(said, partial(trained, key, value), of_rows=key == "micro_batch_tokens"))
    if not recipe.base.quantize and not tuning.training.shard:
        packed = replace(recipe.base, quantize="nf4")
        found.append(_Change("base.quantize=nf4", lambda recipe: recipe.model_copy(update={"base": packed})))
    half = max(16, recipe.max_length // 2)
    found.append(_Change(f"max_length={half}", partial(_shortened, half), of_rows=True))
    if isinstance(tuning.method, (Full, Selective)):
        said, lora = f"tunings.{name}.method=lora", LoRA()
        if isinstance(tuning.method, Selective):  # its own settings stay where `--set` changes the method alone
            said, lora = f"{said} --set tunings.{name}.targets={lora.targets}", LoRA(untie=tuning.method.untie)
        found.append(_Change(said, lambda recipe: changed(recipe, method=lora), keeps_method=False))
    return found


def _shortened(length: int, recipe: Recipe) -> Recipe:
    shorter = recipe.model_copy(update={"max_length": length})
    shorter._encoder = None  # it was made for the longer rows
    return shorter


def _cheaper(settings: TrainingSettings, device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"micro_batch_tokens": max(64, settings.token_budget(device.type) // 4)}
    if settings.gradient_checkpointing != 1:
        found["gradient_checkpointing"] = True
    if settings.optimizer == "adamw" and not settings.shard:
        found["optimizer"] = "adafactor"
    return found


def _once(recipe: Recipe, name: str, work: Work | None = None) -> tuple[TuningPlan, Work]:
    """The plan of one tuning, and the rows it was made for, which are read where they are not known."""
    device = resolve_device(recipe.base.device)
    dtype = resolve_dtype(recipe.base.dtype, device)
    base = BaseModel.skeleton(recipe.base, dtype)
    method = recipe.method(name)
    settings = recipe.tunings[name].training
    grafted = recipe.method(method.of) if isinstance(method, Interpolation) else method
    owned: dict[str, Any] = {}
    if isinstance(grafted, Method):
        attach(base, name, grafted, recipe.seed)
        base.use(name)
        owned = parameters(base, name)
    work = work or Work.of(recipe, name, base)
    products = 0
    states: list[Any] = []  # of the optimizer: there until the last validation, which may write answers
    watched = bool(work.largest) and settings.watch not in ("loss", "accuracy")
    with dry_run(base, device):
        ledger = phases.new_ledger()
        counted = {"loading": phases.loading(base, how_stored(recipe.base, base.dtype))}
        if isinstance(method, Interpolation) and isinstance(grafted, Method):
            change = partial(grafted.toward_base, base, name, method.share)
            counted["interpolating"] = phases.interpolating(base, owned, change, ledger)
        if work.largest:
            counted["training"], products, states = phases.training(base, owned, work, settings, ledger)
        if work.validation:
            counted["validation"] = phases.validation(base, owned, work.validation, ledger)
        if work.choosing:
            counted["choosing"] = phases.choosing(base, owned, work.choosing, ledger)
        if work.prompts:
            phase = "validation answers" if watched else "answering"
            if not watched:
                states.clear()
            asked = work.prompts, work.new_tokens, recipe.decoding.beams
            given_back = bool(work.largest) and not watched
            counted[phase] = phases.answering(base, owned, *asked, ledger, given_back)
    found = {phase: {part: parts[part] for part in PARTS} for phase, parts in counted.items()}
    peaks = {phase: sum(parts.values()) for phase, parts in found.items()}
    phase = max(peaks, key=lambda one: peaks[one])
    per_token = products / max(1, sum(len(row) for group in work.largest for row in group))
    made = TuningPlan(
        method=method.method, phases=found, phase=phase, peak_bytes=peaks[phase],
        seconds=per_token * work.tokens / matrix_rate(dtype, device) if work.largest else 0.0,
        file_bytes=sum(tensor.numel() * tensor.dtype.itemsize for tensor in owned.values()),
        rows=work.said, available_bytes=0, fits=True, choices=[],
    )  # fmt: skip
    return made, work


@cache
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


__all__ = ["Choice", "TuningPlan", "advised", "available_bytes", "matrix_rate", "plan"]
