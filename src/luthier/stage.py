"""One stage of a run: load the base, adapt it by one tuning, score it, write what was found.

A stage runs in a fresh process (`python -m luthier.stage RUN NAME`), so that its peak memory is its own;
in the same process where a caller wants that.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from luthier.directory import RunDirectory
from luthier.errors import Interrupted, MemoryRanOut, UserError
from luthier.launched import WORD, Failure, Launched, launched
from luthier.models.allocator import give_back_freed_memory
from luthier.models.base import BaseModel
from luthier.models.kernels.calls import kernels_for, why_none
from luthier.models.load import resolve_device
from luthier.models.memory import before_work, peak_bytes
from luthier.models.shard import shard
from luthier.progress import Progress
from luthier.prompted import prompting
from luthier.recipe import BASELINE, Recipe
from luthier.scoring import (
    Stage,
    encode,
    request_cost,
    score_retention,
    score_tasks,
    validate,
    validation_examples,
)
from luthier.snapshots import keep_snapshots, keep_tuning, score_snapshots, snapshot_steps
from luthier.training.frozen_rows import frozen_rows
from luthier.training.log import log_hooks, tracker_hooks
from luthier.training.loop import Hook, out_of_memory, train
from luthier.training.own_hooks import own_hooks
from luthier.training.ranks import ALONE, Ranks
from luthier.training.settings import TrainingSettings
from luthier.training_rows import training_rows
from luthier.tuning import Interpolation, Method, Prompting, attach, parameters
from luthier.tuning.files import load_tuning

EXIT_INTERRUPTED, EXIT_PEER, EXIT_MEMORY = 3, 4, 5


def run_stage(
    directory: RunDirectory,
    name: str,
    should_stop: Callable[[], bool] = lambda: False,
    process: Launched | None = None,
) -> None:
    """Run one stage: a tuning of the recipe, or the baseline. Its result file is written last.

    `process` is this one of several that run the stage together.
    """
    recipe = directory.recipe()
    device = resolve_device(recipe.base.device)
    after_import = before_work(device)
    tasks = [(task, recipe.examples(task)) for task in recipe.tasks]
    ranks = Ranks.join(process, name, device) if process else ALONE
    device = ranks.device if process else device
    with Progress(name, silent=ranks.rank > 0) as progress:
        if skipped := [row for _, examples in tasks for row in examples.skipped]:
            progress.say(
                f"{len(skipped)} rows skipped, to which their template does not apply: "
                f"{', '.join(skipped[:3])}{' ...' if len(skipped) > 3 else ''}"
            )
        progress.say("loading the base")
        ranks.sharded = ranks.size > 1 and _settings(recipe, name).shard
        base = BaseModel.load(recipe.base, torch.device("cpu") if ranks.sharded else device)
        if base.pads:
            progress.say(f"{base.family} has no packed path here: rows run padded, sorted by length")
        if reason := why_none(base.embedding.weight):
            progress.say(f"no kernels, as {reason}: PyTorch's own operations run instead, which takes longer")
        ranks.agree("base model", base.fingerprint())
        ranks.agree("version of torch and precision", [torch.__version__, str(base.dtype)])
        ranks.agree("kernels", kernels_for(base.embedding.weight) is not None)
        encoder = recipe.encoder(base.tokenizer, base.encoder_decoder, base.context)
        stage = Stage(directory, recipe, base, encoder, tasks, progress, should_stop, ranks)
        if ranks.sharded and (name == BASELINE or isinstance(recipe.method(name), Prompting)):
            shard(base, None, ranks.device)
        if name == BASELINE:
            result: dict[str, Any] = {"scores": score_retention(stage, name, 0)}
        else:
            method = recipe.method(name)
            if isinstance(method, Prompting):
                result = prompting(stage, name, method)
            elif isinstance(method, Interpolation):
                result = _interpolation(stage, name, method)
            else:
                result = _tuning(stage, name, method)
        result |= {"memory_after_import_bytes": after_import, "base": _describe(base)}
    directory.save_result(name, result)


def _settings(recipe: Recipe, name: str) -> TrainingSettings:
    """The training settings of a stage; those of the recipe where it trains nothing."""
    method = None if name == BASELINE else recipe.method(name)
    if isinstance(method, Interpolation):
        return recipe.tunings[method.of].training
    return recipe.tunings[name].training if isinstance(method, Method) else recipe.training


def _tuning(stage: Stage, name: str, method: Method) -> dict[str, Any]:
    """Train a tuning (or take up one that was trained before a stop), save it and score it."""
    base, recipe, directory, encoder = stage.base, stage.recipe, stage.directory, stage.encoder
    reserve = method.virtual_tokens()
    for task, examples in stage.tasks:
        if not examples.train:
            raise UserError(f"{name!r} has to be trained, but the task {task.name!r} has no training rows (`train`).")
    ranks = stage.ranks
    own = recipe.tunings[name].tasks
    validation = encode(stage, validation_examples(stage, own), reserve, "validation")
    trained = directory.result(f"{name}.trained")
    if trained is None:
        base.lends = ranks.sharded  # each rank copies its part
        attach(base, name, method, recipe.trained_with)
        if ranks.sharded:
            shard(base, name, ranks.device)
        settings = recipe.tunings[name].training
        say = stage.progress.say
        enrich = (lambda rows: frozen_rows(base, name, rows, say)) if settings.frozen_cache else (lambda rows: rows)
        with ranks.one_by_one():  # the first prepares the rows in the cache, the others find them there
            rows, describe = training_rows(recipe, recipe.tunings[name], stage.tasks, encoder, reserve, say, enrich)
        steps = settings.steps(len(rows))
        stage.progress.begin("training", steps)
        snapshots = snapshot_steps(steps, settings.snapshots)
        with ExitStack() as stack:
            hooks: list[Hook] = []
            if directory.writes:
                hooks = [stage.progress.training]
                hooks += stack.enter_context(log_hooks(directory.log(name), directory.path / "tensorboard" / name))
                told = recipe.model_dump(mode="json")
                hooks += stack.enter_context(tracker_hooks(settings.trackers, name, directory.path, told))
                hooks += own_hooks(settings.hooks, recipe.data_folder)
                hooks += [keep_snapshots(stage, name, snapshots)]
            done = train(
                base,
                name,
                rows,
                settings,
                recipe.trained_with,
                directory.checkpoints(name),
                validate=(lambda: validate(stage, validation, reserve, settings.watch, own)) if validation else None,
                hooks=hooks,
                should_stop=stage.should_stop,
                ranks=ranks,
            )
        directory.save_log(name, done.history)
        peak = peak_bytes()
        kept = validate(stage, validation, reserve) if validation else None
        give_back_freed_memory()  # what comes now needs less
        trained = {
            "method": method.method,
            "trainable_parameters": sum(parameter.numel() for parameter in parameters(base, name).values()),
            "file_bytes": keep_tuning(stage, name, name),
            "train_seconds": done.seconds,
            "train_tokens": done.tokens,
            "steps": done.step,
            "best_step": done.best_step or done.step,
            "learning_rate": settings.learning_rate or method.defaults.learning_rate,
            "peak_memory_bytes": peak,
            "validation_loss": kept.loss if kept else None,
            "validation_accuracy": kept.accuracy if kept else None,
            "shots": {"asked": 0, "least": 0, "mean": 0.0},
            "history": done.history,
            "snapshots": snapshots,
            **describe(settings.batch_size, done.step),
        }
        directory.save_result(f"{name}.trained", trained)
    else:
        load_tuning(base, directory.tuning(name), name)
        if ranks.sharded:
            shard(base, name, ranks.device)
    base.use(name)
    return {
        **trained,
        "scores": score_tasks(stage, name, reserve) | score_retention(stage, name, reserve),
        "inference": request_cost(stage, name, reserve),
        "snapshots": score_snapshots(stage, name, trained["snapshots"], reserve),
    }


def _interpolation(stage: Stage, name: str, method: Interpolation) -> dict[str, Any]:
    """Take a trained tuning back towards the base, save it as one of its own and score it; the training's cost is the other's."""
    base, directory = stage.base, stage.directory
    load_tuning(base, directory.tuning(method.of), name)
    source: Method = base.methods[name]
    source.toward_base(base, name, method.share)
    if stage.ranks.sharded:
        shard(base, name, stage.ranks.device)
    base.use(name)
    reserve = source.virtual_tokens()
    rows = encode(stage, validation_examples(stage, stage.recipe.tunings[method.of].tasks), reserve, "validation")
    kept = validate(stage, rows, reserve) if rows else None
    trained = directory.result(f"{method.of}.trained") or {}
    return {
        **trained,
        "method": method.method,
        "file_bytes": keep_tuning(stage, name, name),
        "peak_memory_bytes": peak_bytes(),
        "validation_loss": kept.loss if kept else None,
        "validation_accuracy": kept.accuracy if kept else None,
        "history": [],
        "snapshots": [],
        "scores": score_tasks(stage, name, reserve) | score_retention(stage, name, reserve),
        "inference": request_cost(stage, name, reserve),
    }


def _describe(base: BaseModel) -> dict[str, Any]:
    return {
        "model": base.spec.model,
        "family": base.family,
        "parameters": base.parameter_count,
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantized": base.quantized,
        "device": str(base.device),
        "fingerprint": base.fingerprint(),
        "packed": not base.pads,
        "kernels": kernels_for(base.embedding.weight) is not None,
    }


def main(path: str, name: str) -> int:
    """Run a stage as this process's only job; a stop signal saves first. Returns the exit code."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda received, _: asked.append(received))
    _stop_with_parent()
    process = launched(hosts=False)
    directory = RunDirectory.open(Path(path), writes=not (process and process.rank))
    try:
        with explained_memory(name):
            run_stage(directory, name, lambda: bool(asked), process)
    except (UserError, Interrupted) as error:
        code = 2 if isinstance(error, UserError) else EXIT_INTERRUPTED
        if isinstance(error, MemoryRanOut) and not process:
            code = EXIT_MEMORY
        if process:
            process.fail(Failure(code, str(error)))
        else:
            (directory.path / ".error").write_text(str(error), encoding="utf-8")
        return code
    except Exception:
        # Where another process is gone, what it said is the reason, not that it does not answer any more.
        if process and process.failure(within=WORD):
            return EXIT_PEER
        raise
    return 0


@contextmanager
def explained_memory(name: str) -> Iterator[None]:
    """Raise a UserError where memory runs out outside the training steps, which say it themselves."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise MemoryRanOut(
            f"Memory ran out in {name!r}, outside a training step ({str(error).splitlines()[0]}). Quantize the base, lower "
            "`max_length`, take `optimizer: adafactor` or a method with fewer parameters. "
            "What was saved is kept: continue with --resume."
        ) from None


def _stop_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent dies, so that a killed run leaves nothing training behind its back."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    code = main(*sys.argv[1:3])
    sys.stdout.flush()
    # Skip the interpreter's slow tear-down of a large heap: everything is on disk.
    os._exit(code)
