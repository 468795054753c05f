"""Runs of several processes through the command line: what torchrun starts, and what ends them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from luthier.errors import Interrupted, UserError
from luthier.job import run
from luthier.launched import Failure, Launched
from luthier.recipe_file import make_recipe
from tests import tiny


@pytest.fixture
def content(tmp_path: Path) -> dict:
    base = tiny.make("llama")
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"text": f"one asks about room {n}", "who": "one two"} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "base": {"model": str(tmp_path / "base"), "dtype": "float32"},
        "data": str(tmp_path),
        "allow": ["duplicate"],
        "task": {
            "name": "who", "template": "Who: {{ text }} ||| {{ who }}", "train": "rows.jsonl",
            "validation": 3, "test": 5, "max_new_tokens": 4,
        },
        "training": {"max_steps": 12, "batch_size": 4, "checkpoint_every": 3},
        "tunings": {"lora": {"rank": 2}},
    }  # fmt: skip


def save(content: dict, folder: Path) -> str:
    (folder / "r.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "r.yaml")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def by_hand(*arguments: str, size: int = 2) -> list[subprocess.Popen]:
    """Every rank's command with the variables that a launcher sets, but no launcher: exit codes are theirs."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "luthier", "run", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]  # fmt: skip


def test_torchrun_trains_and_scores_as_one_process_does(content: dict, tmp_path: Path) -> None:
    recipe = save(content, tmp_path)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "-m", "luthier", "run", recipe, "--out", str(tmp_path / "two"),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("lora: step 12: validation loss") == 1, "rank 0 alone speaks"
    assert done.stdout.count("report.html") == 1
    run(make_recipe(content), tmp_path / "one", isolate=False)
    found = [json.loads((tmp_path / name / "report.json").read_text())["tunings"]["lora"] for name in ("two", "one")]
    losses = [[event["loss"] for event in one["history"] if "loss" in event] for one in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert found[0]["validation_loss"] == pytest.approx(found[1]["validation_loss"], rel=1e-5)
    answers = [(tmp_path / name / "predictions" / "lora.jsonl").read_text() for name in ("two", "one")]
    assert answers[0] == answers[1], "answers are in the examples' order"
    assert len((tmp_path / "two" / "logs" / "lora.jsonl").read_text().splitlines()) == len(found[0]["history"])


def test_a_mistake_is_said_once_and_every_process_ends_with_code_2(content: dict, tmp_path: Path) -> None:
    content["training"]["batch_size"] = 1
    both = by_hand(save(content, tmp_path))
    ended = [one.communicate(timeout=120) for one in both]
    assert [one.returncode for one in both] == [2, 2]
    assert "batch_size is 1 for 2 processes" in ended[0][1]
    assert "error" not in ended[1][1] and "Traceback" not in ended[0][1] + ended[1][1]
    assert not (tmp_path / "runs").exists()


def test_a_stop_of_one_is_a_stop_of_all(content: dict, tmp_path: Path) -> None:
    content["training"]["max_steps"] = 3000
    recipe, out = save(content, tmp_path), tmp_path / "out"
    both = by_hand(recipe, "--out", str(out))
    log = out / "logs" / "lora.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) >= 5):
        assert time.monotonic() < deadline and both[0].poll() is None, [one.communicate() for one in both]
        time.sleep(0.02)
    both[1].send_signal(signal.SIGTERM)
    ended = [one.communicate(timeout=60) for one in both]
    assert [one.returncode for one in both] == [130, 130]
    assert "its state is saved. Continue with --resume." in ended[0][1] and "stopped" not in ended[1][1]
    assert (out / "checkpoints" / "lora" / "checkpoint.safetensors").is_file()
    assert "Traceback" not in ended[0][1] + ended[1][1]


def test_the_first_failure_is_everyones() -> None:
    variables = {"WORLD_SIZE": "2", "MASTER_PORT": str(free_port())}
    first, second = (Launched({**variables, "RANK": str(rank)}) for rank in range(2))
    first.tell("word", [1])
    assert second.ask("word") == [1]
    assert second.failure() is None
    assert second.fail(Failure(2, "a mistake")) == first.fail(Failure(3, "a stop")) == Failure(2, "a mistake")
    with pytest.raises(UserError, match="a mistake"):
        first.ask("what nobody says")
    assert isinstance(Failure(3, "a stop").error(), Interrupted)
    second.part()
    first.part()


def test_variables_of_half_a_launcher_are_a_mistake() -> None:
    with pytest.raises(UserError, match="WORLD_SIZE is set.*but RANK is None"):
        Launched({"WORLD_SIZE": "2", "MASTER_PORT": "1"})
