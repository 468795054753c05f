"""Training's own record: JSON lines, and TensorBoard's event files."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.errors import UserError
from luthier.training.loop import Hook


@contextmanager
def log_hooks(log: Path, board: Path) -> Iterator[list[Hook]]:
    """Hooks that append each event to `log` and to TensorBoard's files in `board`."""
    from torch.utils.tensorboard import SummaryWriter

    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("a", encoding="utf-8")
        writer = SummaryWriter(str(board))
    except OSError as error:
        raise UserError(f"{log.parent} cannot be written: {error.strerror}.") from None

    def write_line(event: dict[str, Any]) -> None:
        file.write(json.dumps(event) + "\n")
        file.flush()

    def write_board(event: dict[str, Any]) -> None:
        kind = "validation" if "validation_loss" in event else "training"
        for key, value in event.items():
            if key not in ("step", "steps", "tokens", "step_seconds"):
                writer.add_scalar(f"{kind}/{key.removeprefix('validation_')}", value, event["step"])

    try:
        yield [write_line, write_board]
    finally:
        file.close()
        writer.close()
