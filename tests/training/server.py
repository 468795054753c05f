"""A process that stays and runs what it is asked, a JSON line each: torch is loaded once for many forks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from tests import tiny


def serve(run: Callable[[dict[str, Any]], Any]) -> None:
    """Answer every line on standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # trainers of tokenizers print
    tiny.byte_bpe(), tiny.unigram()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


@contextmanager
def asking(module: str, **environment: str) -> Iterator[Callable[[Any], Any]]:
    """Start a module that serves; yields what asks it with a dataclass and gives its answer."""
    server = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip

    def ask(what: Any) -> Any:
        server.stdin.write(json.dumps(asdict(what)) + "\n")
        server.stdin.flush()
        said = server.stdout.readline()
        assert said, "the server failed; its traceback is above"
        return json.loads(said)

    yield ask
    server.communicate(timeout=60)
