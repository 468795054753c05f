"""A cached folder is whole or made again; a worker's answers come in order."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import PicklingError

import pytest

from luthier import cached as module
from luthier.cached import SEAL, cached, file_digest, mapped
from luthier.errors import UserError
from luthier.workers import ordered_map


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


class Making:
    """Counts how often a folder is made."""

    times = 0

    def __call__(self, place: Path) -> None:
        self.times += 1
        (place / "a.bin").write_bytes(b"0123456789")
        (place / "b.bin").write_bytes(b"")


def test_it_is_made_once_and_again_after_any_damage() -> None:
    make = Making()
    folder = cached("kind", "key", make)
    assert cached("kind", "key", make) == folder and make.times == 1
    assert (folder / "a.bin").read_bytes() == b"0123456789"

    def truncated() -> None:
        (folder / "a.bin").write_bytes(b"01234")

    def same_size() -> None:
        (folder / "a.bin").write_bytes(b"0123456780")

    def missing() -> None:
        (folder / "b.bin").unlink()

    def unsealed() -> None:
        (folder / SEAL).unlink()

    def bad_seal() -> None:
        (folder / SEAL).write_text("[1")

    for times, damage in enumerate((truncated, same_size, missing, unsealed, bad_seal), 2):
        time.sleep(0.01)  # a file system's clock has ticks
        damage()
        assert (cached("kind", "key", make) / "a.bin").read_bytes() == b"0123456789", damage.__name__
        assert make.times == times, damage.__name__
        assert mapped(folder / "a.bin")[:] == b"0123456789", "a map of the damaged file is not used"


def test_two_at_once_both_get_a_whole_one_and_nothing_else_is_left() -> None:
    def slowly(place: Path) -> None:
        (place / "a.bin").write_bytes(b"0" * 1000)
        time.sleep(0.2)
        (place / "a.bin").write_bytes(b"1" * 1000)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: cached("kind", "key", slowly), range(4)))
    assert len(set(found)) == 1
    assert (found[0] / "a.bin").read_bytes() == b"1" * 1000
    assert [one.name for one in found[0].parent.iterdir()] == ["key"]


def test_a_failure_and_a_kill_leave_nothing_that_is_used(tmp_path: Path) -> None:
    def fails(place: Path) -> None:
        (place / "a.bin").write_bytes(b"half")
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        cached("kind", "key", fails)
    assert list((tmp_path / "cache" / "kind").iterdir()) == []
    killed = (
        "import os, signal\nfrom luthier.cached import cached\n"
        "def make(place):\n (place / 'a.bin').write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "cached('kind', 'key', make)"
    )
    assert subprocess.run([sys.executable, "-c", killed]).returncode < 0
    left = list((tmp_path / "cache" / "kind").iterdir())
    assert [one.name.startswith(".key-") for one in left] == [True]
    make = Making()
    assert (cached("kind", "key", make) / "a.bin").read_bytes() == b"0123456789" and make.times == 1
    os.utime(left[0], (0, 0))
    cached("kind", "other", make)
    assert not left[0].exists(), "what a kill left is removed once it is old"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written.*LUTHIER_CACHE"):
        cached("kind", "key", Making())


def test_a_digest_follows_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"one")
    first = file_digest(path)
    path.write_bytes(b"two")  # as long, within the same tick of the clock
    assert file_digest(path) != first
    monkeypatch.setattr(module, "SETTLED_SECONDS", -1.0)
    second = file_digest(path)
    notes = list((tmp_path / "cache" / "digests").iterdir())
    assert [json.loads(note.read_text())["sha256"] for note in notes] == [second]
    monkeypatch.setattr(module.hashlib, "file_digest", None)
    assert file_digest(path) == second, "known: the file is not read again"


def double(number: int) -> int:
    if number == 77:
        raise UserError("row 77 is bad")
    if number == 99:
        os._exit(1)
    return 2 * number


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_answer_in_order(workers: int) -> None:
    assert list(ordered_map(double, range(50), workers)) == [2 * n for n in range(50)]
    with pytest.raises(UserError, match="row 77 is bad"):
        list(ordered_map(double, range(90), workers))


def test_items_are_asked_for_as_they_are_needed() -> None:
    taken = []

    def items():
        for number in range(50):
            taken.append(number)
            yield number

    answers = ordered_map(double, items(), 2)
    assert next(answers) == 0
    assert len(taken) <= 6, "a long list is never read ahead of the work"
    answers.close()


class Unpicklable(Exception):
    def __init__(self, row: int, reason: str):
        super().__init__(f"row {row}: {reason}")


def unpicklable(number: int):
    if number == 1:
        raise Unpicklable(number, "odd")
    return (lambda: number) if number == 2 else number


@pytest.mark.parametrize(("number", "message"), [(1, "Unpicklable: row 1: odd"), (2, "pickle")])
def test_what_cannot_be_pickled_is_told(number: int, message: str) -> None:
    with pytest.raises((RuntimeError, AttributeError, PicklingError), match=message):
        list(ordered_map(unpicklable, [0, number, 0], 2))


def test_a_worker_that_dies_is_said() -> None:
    with pytest.raises(UserError, match="worker process ended"):
        list(ordered_map(double, [1, 99, 2], 2))
