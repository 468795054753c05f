"""A killed and resumed training ends in the bits of one that was never killed; so does one whose disk was full.

Real processes are killed (SIGKILL) at random points and in the middle of writing checkpoints. `make test-long` repeats it
with more points for each method.
"""

import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests import tiny
from tests.training.kill_server import Trial
from tests.training.server import asking
from tests.training.test_loop import METHODS, rows_for, same, weights

from luthier.encoding.order import Shuffled
from luthier.errors import UserError
from luthier.training.loop import train
from luthier.training.settings import TrainingSettings
from luthier.tuning import Full, attach

EVERY_METHOD = [Trial(method) for method in METHODS]
OTHERS = [
    Trial("lora", rows="mixture"),
    Trial("lora", rows="stream"),
    Trial("prompt_tuning", rows="mixture-of-streams"),
    Trial("lora", family="t5"),
    Trial("lora", family="opt"),  # padded, not packed
    Trial("full", dtype="bfloat16"),  # fp32 masters
]
Kill = Callable[[Trial], dict]


@pytest.fixture(scope="module")
def kill() -> Iterator[Kill]:
    with asking("tests.training.kill_server") as ask:
        yield ask


def kills_of(trial: Trial) -> int:
    return trial.kills + trial.writes


def name(trial: Trial) -> str:
    return f"{trial.method}-{trial.family}-{trial.dtype}-{trial.rows}"


@pytest.mark.parametrize("trial", EVERY_METHOD + OTHERS, ids=name)
def test_a_killed_training_ends_in_the_same_bits(trial: Trial, kill: Kill) -> None:
    found = kill(trial)
    assert found["kills"] == kills_of(trial) >= 3
    assert found["resumed"] == found["straight"], "weights, optimizer, generator, position and best so far"
    assert found["leftovers"] == [], "what a kill left half-written is removed"


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_many_kills_of_each_method(method: str, family: str, seed: int, kill: Kill) -> None:
    for rows in ("file", "mixture") + (("stream",) if family != "t5" else ()):
        trial = Trial(method, family, rows=rows, kills=5, writes=2, seed=seed)
        found = kill(trial)
        assert found["kills"] == kills_of(trial) >= 3
        assert found["resumed"] == found["straight"] and found["leftovers"] == [], rows


def test_a_full_disk_leaves_the_checkpoint_before_good(tmp_path: Path) -> None:
    settings = TrainingSettings(max_steps=6, batch_size=4, checkpoint_every=2)

    def fresh():
        base = tiny.make("llama")
        attach(base, "t", Full())
        return base

    whole, base = fresh(), fresh()
    rows = rows_for(base)
    train(whole, "t", Shuffled(rows, 3), settings, 3, tmp_path / "whole")
    folder = tmp_path / "full"
    checkpoint = folder / "checkpoint.safetensors"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    held: list[bytes] = []

    def fill(event: dict) -> None:
        if event["step"] == 3:
            held.append(checkpoint.read_bytes())
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(held[0]) // 2, hard))

    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    try:
        with pytest.raises(UserError, match="could not be written: .*What was there before is unchanged"):
            train(base, "t", Shuffled(rows, 3), settings, 3, folder, hooks=[fill])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.read_bytes() == held[0]
    assert [one.name for one in folder.iterdir()] == ["checkpoint.safetensors"]
    again = fresh()
    assert train(again, "t", Shuffled(rows, 3), settings, 3, folder).step == 6
    assert same(weights(again), weights(whole))
