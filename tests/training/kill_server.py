"""Trains in child processes, kills them at random points and trains on: `python -m tests.training.kill_server`.

It imports once and forks for each trial, and never runs a backward pass itself: a fork after one cannot run its own.
A request is a line of JSON, a trial the fields below; the answer is a line of JSON.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from tests import tiny
from tests.training.server import serve
from tests.training.test_loop import METHODS, rows_for

from luthier.data.load import load_examples
from luthier.data.source import Source
from luthier.data.task import Task
from luthier.encoding.batches import collate
from luthier.encoding.encoder import Encoder
from luthier.encoding.order import Mixed, Shuffled, Stream, Streamed
from luthier.models import tensor_file
from luthier.models.base import BaseModel
from luthier.models.loss import label_scores
from luthier.training import loop
from luthier.training.checkpoint import Progress
from luthier.training.optimizer import Optimizer
from luthier.training.settings import TrainingSettings
from luthier.tuning import attach, parameters

# Epochs of 5 to 6 steps: checkpoints at 2, 4, ... and validations at each epoch's end fall on different steps.
SETTINGS = TrainingSettings(epochs=3, batch_size=4, checkpoint_every=2, micro_batch_tokens=40, learning_rate=3e-3)


@dataclass
class Trial:
    method: str
    family: str = "llama"
    dtype: str = "float32"
    rows: str = "file"  # or mixture, stream, mixture-of-streams
    kills: int = 2  # at random points
    writes: int = 1  # in the middle of writing a checkpoint
    seed: int = 0


def stream_of(base: BaseModel, kind: str, folder: Path) -> Stream:
    rows = rows_for(base)
    if kind == "file":
        return Shuffled(rows, 3)
    if kind == "mixture":
        return Mixed([rows[:13], rows[13:]], [0.7, 0.3], len(rows), 3)
    for number, size in enumerate([7, 5, 9]):
        lines = "".join(json.dumps({"q": f"where is {number} {n}", "a": f"{n} nine"}) + "\n" for n in range(size))
        (folder / f"part-{number}.jsonl").write_text(lines)
    source = Source("part-*.jsonl", stream=True, buffer=3)
    examples = load_examples(Task(template="{{ q }} ||| {{ a }}", train=source, validation=0, test=0), folder, 3)
    encoder = Encoder(tiny.byte_bpe(), encoder_decoder=False, chat=False, max_length=64)
    streamed = Streamed(examples.stream, encoder.encode_all, 21)
    return streamed if kind == "stream" else Mixed([rows, streamed], [0.5, 0.5], 21, 3)


def child(trial: Trial, folder: Path, told: int, halt_in_write: int) -> None:
    """Train to the end, a byte to `told` for each event; then leave the digest of all that was learnt."""
    torch.manual_seed(os.getpid())  # whatever the process's generator holds
    base = tiny.make(trial.family, getattr(torch, trial.dtype))
    attach(base, "t", METHODS[trial.method], seed=1)
    held = collate(rows_for(base, 3), base.decoder_start if base.encoder_decoder else None)
    made: list[Optimizer] = []

    class Kept(Optimizer):
        def __init__(self, *given) -> None:
            super().__init__(*given)
            made.append(self)

    loop.Optimizer = Kept
    if halt_in_write:
        tensor_file.stream = halting(tensor_file.stream, told, halt_in_write)
    progress = loop.train(
        base, "t", stream_of(base, trial.rows, folder), SETTINGS, 3, folder,
        # Nearness to a loss that is passed on the way: the best is not the last.
        validate=lambda: loop.Validation(abs(5.5 + float(label_scores(base, held)[0].mean())), 0.0),
        hooks=[lambda event: os.write(told, b".")],
    )  # fmt: skip
    (folder / "digest").write_text(digest(base, made[0], progress))
    os._exit(0)


def halting(stream, told: int, at: int):
    """The `at`-th checkpoint of this process is written by half; there it waits for its end."""
    count = 0

    def save(path, tensors, metadata) -> None:
        nonlocal count
        count += 1
        stream(path, tensors, metadata)
        if count == at:
            os.truncate(path, Path(path).stat().st_size // 2)
            os.write(told, b"w")
            time.sleep(60)

    return save


def digest(base: BaseModel, optimizer: Optimizer, progress: Progress) -> str:
    found = hashlib.sha256()
    tensors = {**parameters(base, "t"), **optimizer.state(), "generator": torch.get_rng_state()}
    for key, tensor in sorted(tensors.items()):
        raw = (
            tensor.detach().contiguous().view(torch.uint8)
            if tensor.ndim
            else tensor.detach().reshape(1).view(torch.uint8)
        )
        found.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode() + raw.numpy().tobytes())
    known = (progress.step, progress.tokens, progress.best, progress.best_step)
    return f"{found.hexdigest()} {known}"


def start(trial: Trial, folder: Path, halt_in_write: int = 0) -> tuple[int, int]:
    heard, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(heard)
        try:
            child(trial, folder, told, halt_in_write)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(told)
    return pid, heard


def listen(heard: int, events: int, until: bytes = b".") -> bool:
    """Wait for that many events; whether they came before the child's end."""
    while events:
        said = os.read(heard, 1)
        if not said:
            return False
        events -= said == until
    return True


def kill(pid: int) -> bool:
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def finish(pid: int, heard: int, folder: Path) -> str:
    listen(heard, 1_000_000)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"a child failed with status {status}; its traceback is above"
    os.close(heard)
    return (folder / "digest").read_text()


def run(trial: Trial) -> dict:
    draw = random.Random(trial.seed)
    with tempfile.TemporaryDirectory() as name:
        whole, folder = Path(name) / "whole", Path(name) / "killed"
        whole.mkdir()
        began = time.monotonic()
        straight = finish(*start(trial, whole), whole)
        pace = (time.monotonic() - began) / 20
        killed = kept_checkpoint = 0
        left = ["random"] * trial.kills + ["write"] * trial.writes
        draw.shuffle(left)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        saved = folder / "checkpoint.safetensors"
        while left:
            before = saved.read_bytes() if saved.is_file() else None
            if left[0] == "write":
                pid, heard = start(trial, folder, halt_in_write=draw.randint(1, 2))
                met = listen(heard, 1, b"w")
                torn = [one for one in folder.iterdir() if one.name.startswith(".checkpoint")]
            else:
                pid, heard = start(trial, folder)
                met = listen(heard, draw.choice([0, 1, 1, 2, 3, 4, 5]))
                time.sleep(draw.uniform(0, pace))
            if kill(pid) and met:
                killed += 1
                if left.pop(0) == "write":
                    assert torn, "it was not killed in the middle of a checkpoint"
                    kept_checkpoint += before is not None and saved.is_file()
            else:  # it was too quick: from the beginning
                assert (folder / "digest").is_file(), "a child failed; its traceback is above"
                shutil.rmtree(folder)
                folder.mkdir()
            os.close(heard)
        resumed = finish(*start(trial, folder), folder)
        leftovers = [one.name for one in folder.iterdir() if one.name.startswith(".")]
    return {"kills": killed, "straight": straight, "resumed": resumed, "leftovers": leftovers}


if __name__ == "__main__":
    serve(lambda asked: run(Trial(**asked)))
