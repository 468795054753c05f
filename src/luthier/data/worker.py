"""Rendering templates from outside in a process of its own, under a memory limit and a deadline.

Jinja's sandbox keeps a template from reaching Python; it does not keep it from looping for ever or from
growing without end. A template that is not the user's own therefore renders here. One JSON object a line goes
in, one comes out; a worker that exceeds its limits is killed, and the row is named.
"""

import json
import resource
import selectors
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from luthier.data.template import Template
from luthier.errors import UserError

SECONDS = 10.0
MEMORY = 1 << 30  # bytes of address space; the worker itself needs about 100 MB
OUTPUT = 1 << 22  # characters of one rendering


class RenderWorker:
    """A child process that renders; use as a context manager."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds = seconds
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> "RenderWorker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the child; another begins when it is needed."""
        self._stop()

    def parts(
        self,
        template: Template,
        values: Mapping[str, Any],
        where: str,
        *,
        seed: int | str | None = None,
        truncate: bool = False,
    ) -> tuple[list[str], list[str] | None]:
        """Parts and answer choices of one row; raises UserError as `Template.parts` does, and past the limits."""
        asked = {
            "text": template.text,
            "choices": template.choice_text,
            "strict": template.strict,
            "values": dict(values),
            "where": where,
            "seed": seed,
            "truncate": truncate,
        }
        try:
            line = json.dumps(asked, default=str)  # dates and bytes, which JSON has not, as Jinja would write them
        except RecursionError:
            raise UserError(f"{where}: the row's values are nested too deeply for a template.") from None
        child = self._started()
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(line + "\n")
        child.stdin.flush()
        with selectors.DefaultSelector() as ready:
            ready.register(child.stdout, selectors.EVENT_READ)
            if not ready.select(self.seconds):
                self._stop()
                raise UserError(
                    f"{where}: the template did not finish within {self.seconds:g} seconds and was stopped. "
                    "It may loop for ever."
                )
        line = child.stdout.readline()
        if not line:
            self._stop()
            raise UserError(f"{where}: the template took more than {MEMORY >> 20} MiB and was stopped.")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["parts"], answer["choices"]

    def _started(self) -> "subprocess.Popen[str]":
        if self._child is None or self._child.poll() is not None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "luthier.data.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            assert self._child.stdout is not None
            self._child.stdout.readline()  # it is ready: starting is not the template's time
        return self._child

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    try:
        template = Template(asked["text"], asked["choices"], asked["strict"])
        parts = template.parts(asked["values"], asked["where"], seed=asked["seed"], truncate=asked["truncate"])
        choices = template.choices(asked["values"], asked["where"])
    except UserError as error:
        if isinstance(error.__cause__, MemoryError):
            raise MemoryError from None
        return {"error": str(error)}
    if sum(map(len, parts)) > OUTPUT:
        return {
            "error": f"{asked['where']}: the template wrote {sum(map(len, parts)):,} characters; {OUTPUT:,} are allowed."
        }
    return {"parts": parts, "choices": None if choices is None else list(choices)}


def main() -> None:
    """Answer requests on standard input until it ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", flush=True)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_answer(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
