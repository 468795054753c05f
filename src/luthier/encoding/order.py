"""Which row is trained on when: the k-th row of a run is a function of (seed, k), so a resume needs no replay."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from luthier.data.mixture import Draws
from luthier.data.task import Example, ExampleStream
from luthier.encoding.encoder import Encoded
from luthier.errors import UserError


class Stream(Protocol):
    """Training rows in an endless order; its length is the rows of one epoch."""

    def __len__(self) -> int:
        """Rows in an epoch."""

    def at(self, k: int) -> Encoded:
        """The row at place `k` (from 0)."""

    def state(self) -> dict[str, Any]:
        """What, besides `k`, `restore` needs to go on from here; nothing where rows can be had in any order."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""


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

    def state(self) -> dict[str, Any]:
        """Nothing: any row can be had at any time."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to do."""


class Streamed:
    """The rows of a streamed source, encoded as they come; `epoch` rows count as an epoch.

    Places must be asked for in their order. A row that cannot be trained on (no target, or no room for its prompt) is
    left out and counted. The state is where the present shard began: going on replays that shard and no other.
    """

    def __init__(self, stream: ExampleStream, encode: Callable[[Example], list[Encoded]], epoch: int):
        self._stream, self._encode, self.epoch = stream, encode, epoch
        self.left_out = self.tokens = 0
        self._began: dict[str, int] = {"turn": 0, "place": 0, "k": 0, "left_out": 0, "tokens": 0}
        self._rows = self._read()
        self._next = 0
        self._row: Encoded | None = None

    def __len__(self) -> int:
        return self.epoch

    def at(self, k: int) -> Encoded:
        """The row at place `k`, not before the one asked for last."""
        assert k >= self._next - 1, f"a stream does not go back from {self._next - 1} to {k}"
        while self._next <= k or self._row is None:
            self._row = next(self._rows)
            self._next += 1
        return self._row

    def state(self) -> dict[str, Any]:
        """Where the present shard began."""
        return dict(self._began)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the beginning of a shard."""
        self._began = dict(state)
        self._next, self.left_out, self.tokens = state["k"], state["left_out"], state["tokens"]
        self._row, self._rows = None, self._read()

    def _read(self) -> Iterator[Encoded]:
        turn, place = self._began["turn"], self._began["place"]
        k = at_turn = self._began["k"]
        while True:
            order, began_at = self._stream.order(turn), place
            for shard in order[place:]:
                counted = {"left_out": self.left_out, "tokens": self.tokens}
                self._began = {"turn": turn, "place": place, "k": k, **counted}
                for example in self._stream.shard(turn, shard):
                    for row in self._trainable(example):
                        k += 1
                        self.tokens += len(row)
                        yield row
                place += 1
            if k == at_turn and not began_at:
                raise UserError("The streamed training rows hold no row that can be trained on.")
            turn, place, at_turn = turn + 1, 0, k

    def _trainable(self, example: Example) -> list[Encoded]:
        try:
            rows = self._encode(example) if example.prompt and example.completion else []
        except UserError:
            rows = []
        self.left_out += not rows
        return rows


class Mixed:
    """The rows of several entries of a mixture, drawn by rate; `epoch` draws count as an epoch."""

    def __init__(self, rows: Sequence[Sequence[Encoded] | Streamed], rates: Sequence[float], epoch: int, seed: int):
        self.rows, self.epoch = rows, epoch
        self.draws = Draws(rates, [len(one) for one in rows], seed)

    def __len__(self) -> int:
        return self.epoch

    def at(self, k: int) -> Encoded:
        """The row at draw `k`."""
        entry, occurrence = self.draws.occurrence(k)
        rows = self.rows[entry]
        return rows.at(occurrence) if isinstance(rows, Streamed) else rows[self.draws.row(entry, occurrence)]

    def state(self) -> dict[str, Any]:
        """The states of the entries that are streamed."""
        return {str(place): one.state() for place, one in enumerate(self.rows) if isinstance(one, Streamed)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from these states."""
        for place, one in enumerate(self.rows):
            if isinstance(one, Streamed):
                one.restore(state[str(place)])


def step_places(stream: Stream, batch_size: int, step: int) -> range:
    """The places that optimizer step `step` takes; the last batch of an epoch may be smaller."""
    per_epoch = -(-len(stream) // batch_size)
    epoch, batch = divmod(step, per_epoch)
    start = epoch * len(stream) + batch * batch_size
    return range(start, min(start + batch_size, (epoch + 1) * len(stream)))


def step_rows(stream: Stream, batch_size: int, step: int) -> list[Encoded]:
    """The rows of optimizer step `step`."""
    return [stream.at(k) for k in step_places(stream, batch_size, step)]
