"""Batch: packed tokens, and which of them are targets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of a batch run through the tuning `name` (None: the bare base)."""

    name: str | None
    start: int
    stop: int


@dataclass(frozen=True)
class Packed:
    """Sequences one after another without padding.

    A row may fork: after its shared part come `branches`, alternatives that see the shared part and
    themselves but not each other (the choices of a question, the rows of a batch that begin alike).
    """

    ids: Tensor  # (T,) token ids
    lengths: tuple[int, ...]  # tokens of each row, branches included; they sum to T
    branches: tuple[tuple[int, ...], ...] = ()  # per row the lengths of its branches; () for none

    def positions(self, starts: tuple[int, ...] = ()) -> list[int]:
        """Position of each token in its row, from `starts` (default 0); a branch continues where the shared part ended."""
        positions: list[int] = []
        for row, length in enumerate(self.lengths):
            branches = self.branches[row] if self.branches else ()
            first = starts[row] if starts else 0
            shared = first + length - sum(branches)
            positions.extend(range(first, shared))
            for branch in branches:
                positions.extend(range(shared, shared + branch))
        return positions

    def to(self, device: torch.device) -> "Packed":
        """Copy the ids to a device."""
        return replace(self, ids=self.ids.to(device, non_blocking=True))


@dataclass(frozen=True)
class Batch:
    """Rows to run at once.

    Decoder-only: `source` holds prompt and completion, `decoder` is None. Encoder-decoder: `source`
    is the encoder's input and `decoder` the decoder's; `decoder_rows` says which source row each
    decoder row reads (several choices may read one).
    `targets[i]` is the index, in the packed sequence whose states feed the head, of the state that
    predicts `labels[i]`; `owners[i]` is the position in `ids` of the row it belongs to.
    """

    ids: tuple[str, ...]
    source: Packed
    targets: Tensor  # (N,)
    labels: Tensor  # (N,)
    owners: Tensor  # (N,)
    decoder: Packed | None = None
    decoder_rows: tuple[int, ...] = ()
    segments: tuple[Segment, ...] = ()
    states: Tensor | None = None  # (T, D) of the source after `frozen` blocks, where they were computed beforehand
    frozen: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that pass through the model, encoder and decoder together."""
        return sum(self.source.lengths) + (sum(self.decoder.lengths) if self.decoder else 0)

    def to(self, device: torch.device) -> "Batch":
        """Copy the tensors to a device."""
        return replace(
            self,
            source=self.source.to(device),
            decoder=self.decoder.to(device) if self.decoder else None,
            targets=self.targets.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            owners=self.owners.to(device, non_blocking=True),
            states=None if self.states is None else self.states.to(device, non_blocking=True),
        )


# The least tokens that are worth computing once for several rows.
SHARED = 32


def common_start(rows: Sequence[list[int]], limit: int) -> int:
    """How many tokens, at most `limit`, all rows begin with alike where it pays to compute them once; else 0."""
    if len(rows) < 2:
        return 0
    first, last = min(rows), max(rows)  # what these two share, all between them do
    count = next((at for at in range(limit) if first[at] != last[at]), max(limit, 0))
    return count if count >= SHARED else 0


def token_parts(segments: tuple[Segment, ...], lengths: tuple[int, ...]) -> tuple[slice, ...]:
    """Each segment's slice of the packed tokens."""
    return tuple(slice(sum(lengths[: segment.start]), sum(lengths[: segment.stop])) for segment in segments)


def row_parts(segments: tuple[Segment, ...]) -> tuple[slice, ...]:
    """Each segment's slice of the rows."""
    return tuple(slice(segment.start, segment.stop) for segment in segments)
