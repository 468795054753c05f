"""Streams: rows read from their shards while they are trained on, for sources that do not fit on disk or in a cache.

The order is a function of the seed, the shards and the buffer: each pass goes through the shards in an order of its
own, and through each shard by a buffer from which rows are drawn. The buffer is emptied at a shard's end, so what a
shard gives does not depend on the others: whoever knows the shard and how many of its rows are behind can go on.
"""

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from luthier.data.rows import Row
from luthier.data.source import Source, shards

# Rows that stand for a streamed source where all would have to be read: for the audit, as shots, in previews.
SAMPLE = 2000


class RowStream:
    """A streamed source in an endless order."""

    def __init__(self, source: Source, folder: Path, seed: int):
        self.source, self.seed = source, seed
        self.shards = shards(source, folder)

    def order(self, turn: int) -> list[int]:
        """The shards in the order of one pass over them."""
        every = list(range(len(self.shards)))
        random.Random(f"shards {self.seed} {turn}").shuffle(every)
        return every

    def shard(self, turn: int, shard: int) -> Iterator[Row]:
        """The rows of one shard in the order of one pass."""
        draws = random.Random(f"buffer {self.seed} {turn} {shard}")
        held: list[Row] = []
        for row in self.shards[shard]():
            if len(held) < self.source.buffer:
                held.append(row)
                continue
            place = draws.randrange(len(held))
            yield held[place]
            held[place] = row
        draws.shuffle(held)
        yield from held

    def sample(self) -> Iterator[Row]:
        """The first rows of the first pass."""
        every = (row for shard in self.order(0) for row in self.shard(0, shard))
        return islice(every, SAMPLE)
