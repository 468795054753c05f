"""Which row is trained on when: the k-th row of a run is a function of (seed, k), so a resume needs no replay."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from luthier.data.mixture import Draws
from luthier.encoding.encoder import Encoded


class Stream(Protocol):
    """Training rows in an endless order; its length is the rows of one epoch."""

    def __len__(self) -> int:
        """Rows in an epoch."""

    def at(self, k: int) -> Encoded:
        """The row at place `k` (from 0)."""


class Shuffled:
    """The rows of one task: each once an epoch, in a new order each time."""

    def __init__(self, rows: Sequence[Encoded], seed: int):
        self.rows, self.seed = rows, seed
        self._latest: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, k: int) -> Encoded:
        """The row at place `k`."""
        return self.rows[self.place(k)]

    def place(self, k: int) -> int:
        """The number of the row at place `k`."""
        epoch, place = divmod(k, len(self.rows))
        if self._latest is None or self._latest[0] != epoch:
            self._latest = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows)))
        return int(self._latest[1][place])


class Mixed:
    """The rows of several entries of a mixture, drawn by rate; `epoch` draws count as an epoch."""

    def __init__(self, rows: Sequence[Sequence[Encoded]], rates: Sequence[float], epoch: int, seed: int):
        self.rows, self.epoch = rows, epoch
        self.draws = Draws(rates, [len(one) for one in rows], seed)

    def __len__(self) -> int:
        return self.epoch

    def at(self, k: int) -> Encoded:
        """The row at draw `k`."""
        entry, row = self.draws.at(k)
        return self.rows[entry][row]


def step_places(stream: Stream, batch_size: int, step: int) -> range:
    """The places that optimizer step `step` takes; the last batch of an epoch may be smaller."""
    per_epoch = -(-len(stream) // batch_size)
    epoch, batch = divmod(step, per_epoch)
    start = epoch * len(stream) + batch * batch_size
    return range(start, min(start + batch_size, (epoch + 1) * len(stream)))


def step_rows(stream: Stream, batch_size: int, step: int) -> list[Encoded]:
    """The rows of optimizer step `step`."""
    return [stream.at(k) for k in step_places(stream, batch_size, step)]
