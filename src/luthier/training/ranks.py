"""Several processes that train one tuning: how a step's rows are divided, and its gradients added up.

    g = sum over ranks of sum over the rank's targets of dloss / (targets of the whole batch)

The optimizer's batch is the recipe's, whatever the number of ranks, and how it is divided is a function of its rows
alone. Sums are fp32. Every rank makes the same step; rank 0 alone writes files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from luthier.encoding.encoder import Encoded
from luthier.errors import UserError
from luthier.launched import Launched
from luthier.models.shard import local

# Numbers added up in one collective: an fp32 copy of so many gradients exists at a time.
BUCKET = 16_000_000

Item = TypeVar("Item")
Result = TypeVar("Result")


class Ranks:
    """This process among `size`; alone, every method is free."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None):
        self.rank, self.size = rank, size
        self.sharded = False  # then all run the same rows where nothing is learnt: blocks are gathered for all at once
        self.device = device or torch.device("cpu")

    @classmethod
    def join(cls, process: Launched, stage: str, device: torch.device) -> "Ranks":
        """Meet the other processes of a stage; returns when all are there.

        Raises UserError where there is no accelerator for each process of this machine.
        """
        import torch.distributed as dist

        if device.type == "cuda":
            if process.local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"{process.local_size} processes were started on a machine with {torch.cuda.device_count()} GPUs. "
                    "Start one a GPU (--nproc-per-node), or set base.device to cpu."
                )
            torch.cuda.set_device(process.local_rank)
            device = torch.device("cuda", process.local_rank)
        # A process that is gone is found by whoever started it, not by a deadline: rank 0 may write for long.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=process.store(f"stage/{stage}"), rank=process.rank, world_size=process.size, timeout=timedelta(days=2),
        )  # fmt: skip
        return cls(process.rank, process.size, device)

    def seed(self, seed: int, step: int) -> int:
        """The seed of what this rank draws in a step: no generator's state has to be kept for any rank but one."""
        return int(np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)[0] >> 1)

    def split(self, rows: Sequence[Encoded]) -> list[list[Encoded]]:
        """Each rank's rows of a batch: the longest first, each to the rank that has the fewest tokens."""
        if self.size == 1:
            return [list(rows)]
        parts: list[list[Encoded]] = [[] for _ in range(self.size)]
        tokens = [0] * self.size
        for row in sorted(rows, key=len, reverse=True):
            least = tokens.index(min(tokens))
            parts[least].append(row)
            tokens[least] += len(row)
        return parts

    def add(self, *numbers: float) -> list[float]:
        """Sums over the ranks of a few numbers."""
        if self.size == 1:
            return list(numbers)
        import torch.distributed as dist

        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def any(self, asked: bool) -> bool:
        """Whether any rank says so: all decide alike."""
        return bool(self.add(float(asked))[0])

    def wait(self) -> None:
        """Return when every rank is here."""
        self.add(0.0)

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """Let rank 0 through first, then the others at once."""
        if self.rank > 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()

    def add_gradients(self, parameters: Mapping[str, Tensor]) -> None:
        """Give every rank the sum of all ranks' gradients; a parameter that none has a gradient of keeps none."""
        parameters = {key: one for key, one in parameters.items() if local(one) is one}  # the others are summed already
        if self.size == 1 or not parameters:
            return
        import torch.distributed as dist

        met = torch.tensor([one.grad is not None for one in parameters.values()], dtype=torch.float32)
        met = met.to(self.device)
        dist.all_reduce(met)
        held: list[Tensor] = []
        for parameter in [one for one, ranks in zip(parameters.values(), met.tolist(), strict=True) if ranks]:
            if held and sum(one.numel() for one in held) + parameter.numel() > BUCKET:
                _add_up(held)
                held = []
            held.append(parameter)
        _add_up(held)

    def gathered(self, function: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result]:
        """`function` of all items, a result for each, in their order: every rank works on its share and gets the whole."""
        if self.size == 1 or self.sharded:
            return list(function(items))
        import torch.distributed as dist

        own = items[self.rank :: self.size]
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, list(function(own)) if own else [])
        results: list[Any] = [None] * len(items)
        for rank, part in enumerate(every):
            results[rank :: self.size] = part
        return results

    def first(self, value: Result) -> Result:
        """What rank 0 gives, on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def agree(self, what: str, value: object) -> None:
        """Raise UserError, on every rank, where `value` is not the same on all."""
        if self.size == 1:
            return
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        others = [rank for rank, one in enumerate(values) if one != values[0]]
        if others:
            raise UserError(f"Rank {others[0]} has another {what} than rank 0: {values[others[0]]}, not {values[0]}.")


def _add_up(parameters: Sequence[Tensor]) -> None:
    if not parameters:
        return
    import torch.distributed as dist

    flat = torch.cat(
        [
            (torch.zeros_like(one) if one.grad is None else one.grad).detach().float().flatten()
            for one in parameters
        ]
    )  # fmt: skip
    dist.all_reduce(flat)
    for parameter, piece in zip(parameters, flat.split([one.numel() for one in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter).to(parameter.dtype)


ALONE = Ranks()
