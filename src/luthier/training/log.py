"""Training's own record: JSON lines, TensorBoard's event files, and trackers that the user asks for."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.errors import UserError, nearest
from luthier.training.loop import Hook


@contextmanager
def log_hooks(log: Path, board: Path) -> Iterator[list[Hook]]:
    """Hooks that append each event to `log` and to TensorBoard's files in `board`."""
    from torch.utils.tensorboard import SummaryWriter

    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{log.parent} cannot be written: {error.strerror}.") from None

    def write_line(event: dict[str, Any]) -> None:
        file.write(json.dumps(event) + "\n")
        file.flush()

    writer: SummaryWriter | None = None

    def write_board(event: dict[str, Any]) -> None:
        nonlocal writer
        # A training that goes on repeats steps that an earlier process had told: those are purged.
        writer = writer or SummaryWriter(str(board), purge_step=event["step"])
        kind = "validation" if "validation_loss" in event else "training"
        for key, value in event.items():
            if key not in ("step", "steps", "tokens", "step_seconds"):
                writer.add_scalar(f"{kind}/{key.removeprefix('validation_')}", value, event["step"])

    try:
        yield [write_line, write_board]
    finally:
        file.close()
        if writer is not None:
            writer.close()


@contextmanager
def tracker_hooks(names: Sequence[str], run: str, folder: Path, recipe: Mapping[str, Any]) -> Iterator[list[Hook]]:
    """Hooks that tell each event's numbers to trackers that accelerate knows: wandb, mlflow, comet_ml, aim ...

    Raises UserError for one that it does not know, or whose package is not installed.
    """
    if not names:
        yield []
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = {str(name): kind for name, kind in LOGGER_TYPE_TO_CLASS.items()}
    ready = {str(name) for name in get_available_trackers()}
    started = []
    for name in names:
        if name not in known:
            raise UserError(f"training.trackers: unknown tracker {name!r}. {nearest(name, known)}")
        if name not in ready:
            raise UserError(f"training.trackers: the package of {name!r} is not installed: pip install {name}.")
        kind = known[name]
        tracker = kind(run, logging_dir=str(folder)) if kind.requires_logging_directory else kind(run)
        tracker.start()
        tracker.store_init_configuration({"tuning": run, "recipe": json.dumps(recipe)})
        started.append(tracker)

    def tell(event: dict[str, Any]) -> None:
        numbers = {key: value for key, value in event.items() if isinstance(value, (int, float)) and key != "step"}
        for tracker in started:
            tracker.log(numbers, step=event["step"])

    try:
        yield [tell]
    finally:
        for tracker in started:
            tracker.finish()
