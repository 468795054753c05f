"""Trains in one or several processes that meet through gloo: `python -m tests.training.rank_server`.

As `kill_server`, it imports once and forks; a request and its answer are lines of JSON.
"""

import json
import os
import socket
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tests import tiny
from tests.training.server import serve
from tests.training.test_loop import METHODS, rows_for

from luthier.directory import RunDirectory
from luthier.encoding.order import Mixed, Shuffled
from luthier.errors import Interrupted, UserError
from luthier.launched import Launched
from luthier.models.shard import shard
from luthier.models.tensor_file import write_tensors
from luthier.scoring import loss_of
from luthier.stage import run_stage
from luthier.training.loop import Validation, train
from luthier.training.ranks import ALONE, Ranks
from luthier.training.settings import TrainingSettings
from luthier.tuning import LoRA, attach, parameters

METHODS = METHODS | {"lora": LoRA(rank=2), "dropout": LoRA(rank=2, dropout=0.1)}


@dataclass
class Together:
    folder: str  # where the checkpoint lies; losses and what was learnt are written there
    method: str = "lora"
    family: str = "llama"
    size: int = 1
    stop_at: int = 0
    rows: int = 22
    settings: dict | None = None
    mixture: bool = False
    shard: bool = False
    dtype: str = "float32"
    stages: list[str] = field(default_factory=list)  # of the run in the folder, instead of a training alone


def child(asked: Together, rank: int, port: int) -> None:
    folder = Path(asked.folder)
    variables = {"RANK": str(rank), "WORLD_SIZE": str(asked.size), "MASTER_PORT": str(port)}
    process = Launched(variables) if asked.size > 1 else None
    if asked.stages:
        run_stages(asked, rank, process)
        return
    ranks = Ranks.join(process, "t", torch.device("cpu")) if process else ALONE
    base = tiny.make(asked.family, getattr(torch, asked.dtype))
    attach(base, "t", METHODS[asked.method], seed=1)
    if asked.shard and asked.size > 1:
        shard(base, "t", ranks.device)
        ranks.sharded = True
    settings = TrainingSettings(
        **{"epochs": 2, "batch_size": 5, "micro_batch_tokens": 40, "learning_rate": 3e-3, "checkpoint_every": 3}
        | (asked.settings or {})
    )
    rows, held = rows_for(base, asked.rows), rows_for(base, 3)
    stream = Mixed([rows[:13], rows[13:]], [0.7, 0.3], len(rows), 3) if asked.mixture else Shuffled(rows, 3)
    seen = [0]
    said = ""
    try:
        progress = train(
            base, "t", stream, settings, 3, folder,
            validate=lambda: Validation(*loss_of(base, held, ranks)),
            hooks=[lambda event: seen.__setitem__(0, event["step"])],
            # One rank alone is asked to stop: the others stop with it.
            should_stop=lambda: rank == asked.size - 1 and 0 < asked.stop_at <= seen[0],
            ranks=ranks,
        )  # fmt: skip
        history = [{key: one[key] for key in one if key != "step_seconds"} for one in progress.history]
        write_tensors(folder / "learnt", parameters(base, "t"), writes=rank == 0)
        if rank == 0:
            (folder / "history.json").write_text(json.dumps(history))
    except (Interrupted, UserError) as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"said.{rank}").write_text(said)
    if process:
        process.part()


def run_stages(asked: Together, rank: int, process: Launched | None) -> None:
    """One process after another would do so; here they are one, without the seconds of importing."""
    folder = Path(asked.folder)
    directory = RunDirectory.open(folder, writes=rank == 0)
    seen = [0]

    def stopping() -> bool:
        seen[0] += 1
        return rank == 0 and seen[0] == asked.stop_at

    said = ""
    for stage in asked.stages:
        try:
            run_stage(directory, stage, stopping, process)
        except (Interrupted, UserError) as error:
            said = f"{type(error).__name__}: {error}"
            break
        if process:
            torch.distributed.destroy_process_group()
    (folder / f"said.{rank}").write_text(said)
    if process:
        process.part()


def run(asked: Together) -> list[str]:
    Path(asked.folder).mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(asked.size):
        pids.append(os.fork())
        if pids[-1] == 0:
            try:
                child(asked, rank, port)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    assert not any(codes), "a process failed; its traceback is above"
    return [(Path(asked.folder) / f"said.{rank}").read_text() for rank in range(asked.size)]


if __name__ == "__main__":
    serve(lambda asked: run(Together(**asked)))
