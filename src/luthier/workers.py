"""Child processes that work through a list in order: for work that is Python's, not torch's.

Not `multiprocessing`: a child there either forks a process full of threads or runs the caller's script again.
"""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from luthier.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def processors() -> int:
    """The processor cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """`function` of each item, in the items' order; at most two items a worker are under way at a time.

    `function` and what it holds are pickled once for each worker. With one worker everything happens here. An
    exception in a worker is raised here (as a RuntimeError that tells of it, where it cannot be pickled); a worker that dies is a UserError.
    """
    count = processors() if workers is None else workers
    if count <= 1:
        yield from map(function, items)
        return
    children = [_start(function) for _ in range(count)]
    idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
    for child in children:
        idle.put(child)

    def ask(item: Any) -> Any:
        child = idle.get()
        try:
            return _ask(child, item)
        finally:
            idle.put(child)

    pending: deque[Future[Any]] = deque()
    threads = ThreadPoolExecutor(count)
    try:
        for item in items:
            pending.append(threads.submit(ask, item))
            if len(pending) > 2 * count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        for child in children:
            child.kill()
        threads.shutdown()
        for child in children:
            child.communicate()


def _start(function: Callable[[Any], Any]) -> "subprocess.Popen[bytes]":
    child = subprocess.Popen(
        [sys.executable, "-m", "luthier.workers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Each worker is one core's: libraries inside it start no threads of their own.
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
    )
    assert child.stdin is not None
    with suppress(BrokenPipeError):  # it ended already: the first item says so
        pickle.dump(list(sys.path), child.stdin)
        pickle.dump(function, child.stdin)
        child.stdin.flush()
    return child


def _ask(child: "subprocess.Popen[bytes]", item: Any) -> Any:
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        pickle.dump(item, child.stdin)
        child.stdin.flush()
        failed, answer = pickle.load(child.stdout)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        raise UserError(
            "A worker process ended before its work was done (out of memory, or killed). Nothing was kept of it; "
            "start again, with more memory free."
        ) from None
    if failed:
        raise answer
    return answer


def main() -> None:
    """Answer items on standard input until it ends; what the work prints goes to standard error."""
    asked = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.path[:] = pickle.load(asked)
    function = pickle.load(asked)
    while True:
        try:
            item = pickle.load(asked)
        except EOFError:
            return
        answers.write(_answer(function, item))
        answers.flush()


def _answer(function: Callable[[Any], Any], item: Any) -> bytes:
    try:
        return pickle.dumps((False, function(item)))
    except Exception as error:
        try:
            told = pickle.dumps((True, error))
            pickle.loads(told)  # many exceptions can be pickled and not be read again
            return told
        except Exception:
            return pickle.dumps((True, RuntimeError(f"{type(error).__name__}: {error}")))


if __name__ == "__main__":
    main()
