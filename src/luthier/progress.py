"""Progress on the terminal: loss, tokens a second, time left, memory; plain lines where it is no terminal."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from luthier.models.memory import resident_bytes

# Seconds between lines where there is no terminal to draw bars on.
QUIET = 15.0


class Progress:
    """Shows one stage's work, unless `silent`."""

    def __init__(self, name: str, silent: bool = False):
        self.name, self.silent = name, silent
        self.console = Console(highlight=False)
        self.bars = Bars(
            TextColumn("{task.fields[name]:<16.16}"),
            TextColumn("{task.description:<18.18}"),
            BarColumn(bar_width=14),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=False,
            disable=silent or not self.console.is_terminal,
        )
        self.current: TaskID | None = None
        self.what = ""
        self.last_line = 0.0
        self.said = ""  # the last line of this bar
        self.tokens = 0
        self.seconds = 0.0

    def __enter__(self) -> "Progress":
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        if self.silent:
            return
        if self.console.is_terminal:
            self.bars.console.print(f"[dim]{self.name}: {text}[/dim]")
        else:
            print(f"{self.name}: {text}", flush=True)

    def begin(self, what: str, total: int) -> None:
        """Start a new bar."""
        self.what = what
        self.current = self.bars.add_task(what, total=total, name=self.name, note="")
        self.last_line = time.monotonic() - QUIET + 2
        self.said = ""

    def advance(self, done: int, of: int) -> None:
        """Move the bar."""
        self._show(done, of, f"{done}/{of}")

    def training(self, event: dict[str, Any]) -> None:
        """Hook of the training loop."""
        if "validation_loss" in event:
            self.say(
                f"step {event['step']}: validation loss {event['validation_loss']:.3f}, "
                f"accuracy {event['validation_accuracy']:.1%}"
                + "".join(
                    f", {key.removeprefix('validation_')} {value:.3f}"
                    for key, value in event.items()
                    if key not in ("step", "validation_loss", "validation_accuracy")
                )
            )
            return
        if "loss_scale" in event:
            self.say(
                f"step {event['step']}: float16 overflowed; the loss is scaled by {event['loss_scale']:g} from here on"
            )
            return
        if "tokens" not in event:
            self.say(
                f"step {event['step']}: out of memory; micro-batches hold {event['micro_batch_tokens']} tokens from here on"
            )
            return
        self.tokens += event["tokens"]
        self.seconds += event["step_seconds"]
        rate = self.tokens / max(self.seconds, 1e-9)
        note = f"loss {event['loss']:.3f} {rate:,.0f} tok/s {resident_bytes() / 1e9:.1f} GB"
        self._show(event["step"], event["steps"], note)

    def _show(self, done: int, of: int, note: str) -> None:
        if self.silent:
            return
        if self.current is not None:
            self.bars.update(self.current, completed=done, total=of, note=note)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.last_line > QUIET or done == of):
            self.last_line = now
            count = f"{done}/{of}"
            line = f"{self.name}: {self.what} {count}" + (f" {note}" if note != count else "")
            if line != self.said:
                print(line, flush=True)
            self.said = line
