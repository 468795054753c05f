"""How the tokens of one forward pass divide into rows, and the keys and values of rows that are being decoded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.models.padded_rows import Layout
from luthier.models.prefix import Prefixes

# Steps in which the keys grow that rows see while they are decoded (those not filled are hidden): with a new size at every step
# the CPU's library of products would make new kernels, some megabytes, at every step.
SEEN = 32


class RowCache:
    """Keys and values of rows that are decoded: those of their own, (rows, K, capacity, d), and once what stands before all of
    them, a tuning's prefix and the tokens that they begin with alike, (1, K, P, d).

    All layers' are made at the first layer's: between the tensors of a pass they would cut its memory into pieces.
    """

    is_compileable = False
    is_sliding = (False,)

    def __init__(
        self,
        layers: int,
        lengths: tuple[int, ...],
        new_tokens: int,
        alike: int = 0,
        prefixes: Prefixes | None = None,
        beams: int = 1,
    ):
        self.layers, self.beams = layers, beams
        self.lengths = list(lengths)  # of the rows, without what they begin with
        self.alike = alike  # tokens that stand before the rows in the pass over the prompts
        self.prefixes = prefixes  # one and the same for all rows
        self.before = alike + (prefixes.lengths[0] if prefixes else 0)  # P
        self.capacity = max(lengths) + new_tokens
        self.filled: Tensor | None = None  # (rows,) tokens each row sees, P included; None until the prompts are in
        self.rooms: dict[str, list[Tensor]] = {}  # what is kept, a tensor a layer

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return the rows' own that this step attends to (transformers' cache contract)."""
        if self.filled is None:
            self._store(key, value, layer)
            return key, value
        for name, heads in (("keys", key), ("values", value)):
            self.rooms[name][layer][self._rows, :, self._places] = heads[:, :, 0]
        seen = max(self.lengths) + 1
        return self.own(layer, seen + -seen % SEEN)

    def own(self, layer: int, seen: int) -> tuple[Tensor, Tensor]:
        """The rows' keys and values in a layer, at most the first `seen`."""
        rows = len(self.lengths)
        return self.rooms["keys"][layer][:rows, :, :seen], self.rooms["values"][layer][:rows, :, :seen]

    def shared(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The keys and values in a layer that stand before all rows' own."""
        return (self.rooms["shared keys"][layer], self.rooms["shared values"][layer]) if self.before else None

    def _store(self, key: Tensor, value: Tensor, layer: int) -> None:
        prefix = (self.prefixes.at(layer, 0, key) if self.prefixes else None) or (None, None)
        for name, heads, first in (("keys", key, prefix[0]), ("values", value, prefix[1])):
            if self.before:
                room = self._room("shared " + name, heads, layer, 1, self.before)
                if first is not None:
                    room[:, :, : first.shape[2]] = first
                room[:, :, self.before - self.alike :] = heads[:, :, : self.alike]
            room = self._room(name, heads, layer, self.beams * len(self.lengths), self.capacity)
            start = self.alike
            for row, length in enumerate(self.lengths):
                room[row, :, :length] = heads[0, :, start : start + length]
                start += length

    def _room(self, name: str, heads: Tensor, layer: int, rows: int, places: int) -> Tensor:
        shape = (rows, heads.shape[1], places, heads.shape[3])
        if name not in self.rooms:
            self.rooms[name] = list(heads.new_zeros(self.layers, *shape))
        if self.rooms[name][layer].shape != shape:  # not all layers are alike
            self.rooms[name][layer] = heads.new_zeros(shape)
        return self.rooms[name][layer]

    def prompts_are_in(self, device: torch.device) -> None:
        """From here on each update is one new token a row."""
        self._stand(torch.tensor(self.lengths, device=device) + self.before)

    def _stand(self, filled: Tensor) -> None:
        """The rows hold so many tokens: where the next ones go, for all layers."""
        self.filled, self._places = filled, filled - self.before
        self._rows = torch.arange(len(filled), device=filled.device)

    def advance(self) -> None:
        """Count the token that the last step stored."""
        assert self.filled is not None
        self._stand(self.filled + 1)
        self.lengths = [length + 1 for length in self.lengths]

    def keep(self, rows: Sequence[int]) -> None:
        """The rows are these from here on, in this order: finished ones leave the batch, beams come from one another."""
        assert self.filled is not None
        self.lengths = [self.lengths[row] for row in rows]
        self._stand(self.filled[torch.tensor(rows, device=self.filled.device)])
        moved = [place for place, row in enumerate(rows) if place != row]
        if moved:
            into = torch.tensor(moved, device=self.filled.device)
            origin = torch.tensor([rows[place] for place in moved], device=self.filled.device)
            for name in ("keys", "values"):
                for room in self.rooms[name]:
                    room[into] = room[origin]

    def get_seq_length(self, *args: Any) -> int:
        """Part of transformers' cache contract; positions are always given explicitly."""
        return 0


# Steps in which the tokens of a pass grow on a CPU, of passes with at least as many: its library of products makes kernels for
# every new shape, keeps them (about half a megabyte each) and takes as long for one as a small product does.
FILLED = {512: 64, 256: 32, 128: 16, 0: 8}


def filler(tokens: int) -> int:
    """How many tokens fill up a pass of so many: a row of zeros at the end, whose states nobody reads."""
    step = next(step for least, step in FILLED.items() if tokens >= least)
    return -tokens % step


# Queries of a causal piece whose scores are made at once.
PART = 128


class Piece(NamedTuple):
    """Tokens of one row that follow one another, and where the keys that they see stand, in one run or several."""

    row: int
    own: slice
    keys: tuple[slice, ...]

    @property
    def length(self) -> int:
        """Queries."""
        return tokens_in(self.own)

    @property
    def seen(self) -> int:
        """Keys, without a prefix."""
        return sum(map(tokens_in, self.keys))

    def of(self, heads: Tensor) -> Tensor:
        """What it sees of keys or values (1, K, T, d): (1, K, seen, d)."""
        runs = [heads[:, :, here] for here in self.keys]
        return runs[0] if len(runs) == 1 else torch.cat(runs, dim=2)

    def parts(self, most: int) -> list["Piece"]:
        """A causal piece cut into such of at most so many queries: none of them needs the keys behind its last one."""
        stops = [*range(self.own.start + most, self.own.stop, most), self.own.stop]
        starts = [self.own.start, *stops[:-1]]
        return [
            Piece(self.row, slice(start, stop), (*self.keys[:-1], slice(self.own.start, stop)))
            for start, stop in zip(starts, stops, strict=True)
        ]


def tokens_in(run: slice) -> int:
    """Tokens in a slice."""
    return int(run.stop - run.start)


class Plan(NamedTuple):
    """Pieces as the kernels read them (`attention.c`)."""

    flat: Tensor
    at: Tensor
    units: Tensor
    shared: Tensor
    rows: int  # keys of pieces that share some, each piece's counted


def plan_of(pieces: Sequence[Piece], together: bool = False) -> Plan:
    """Pieces for the kernels; `together`, all are one thread's."""
    groups: dict[int, list[Piece]] = {}
    for piece in pieces:  # who shares keys shares the first of them
        groups.setdefault(piece.keys[0].start, []).append(piece)
    flat: list[int] = []
    at: list[int] = []
    shared: list[int] = []
    rows = 0
    for group in groups.values():
        if len(group) > 1:
            first = min(run.start for piece in group for run in piece.keys)
            behind = max(run.stop for piece in group for run in piece.keys)
            shared += [first, behind - first, len(group), len(at)]
        for piece in group:
            at.append(len(flat))
            flat += [piece.own.start, piece.length, rows if len(group) > 1 else -1, len(piece.keys)]
            for run in piece.keys:
                flat += [run.start, tokens_in(run)]
            rows += piece.seen if len(group) > 1 else 0
    units = [0, len(at)] if together else list(range(len(at) + 1))
    tensors = [torch.tensor(one, dtype=torch.int64) for one in (flat, at, units, shared)]
    return Plan(tensors[0], tensors[1], tensors[2], tensors[3], rows)


@dataclass
class Packing:
    """How the tokens of one forward pass divide into rows; handed to every attention layer."""

    lengths: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...] = ()
    cache: RowCache | None = None
    prefixes: Prefixes | None = None
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    layout: Layout | None = None
    stops: Tensor | None = None

    def padded(self, device: torch.device) -> Layout:
        """Where the rows' tokens stand once padded at their ends."""
        if self.layout is None:
            self.layout = Layout.of(self.lengths, device)
        return self.layout

    def ends(self, device: torch.device) -> Tensor:
        """Where each row ends, behind a zero: (rows + 1,) int32."""
        if self.stops is None:
            self.stops = torch.tensor([0, *self.lengths]).cumsum(0, dtype=torch.int32).to(device)
        return self.stops

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Rows, a forked one as its shared part and its branches."""
        found: list[Piece] = []
        start = 0
        for row, length in enumerate(self.lengths):
            branches = self.branches[row] if self.branches else ()
            shared = slice(start, start + length - sum(branches))
            if shared.stop > shared.start:
                found.append(Piece(row, shared, (shared,)))
            cursor = shared.stop
            for branch in branches:
                if branch:
                    own = slice(cursor, cursor + branch)
                    found.append(Piece(row, own, (shared, own) if shared.stop > shared.start else (own,)))
                cursor += branch
            start += length
        return tuple(found)

    @cached_property
    def parts(self) -> tuple[Piece, ...]:
        """The pieces, long ones cut: for attention with its scores written out, which so makes few that a mask hides."""
        return tuple(part for piece in self.pieces for part in piece.parts(PART))

    @cached_property
    def plan(self) -> Plan:
        """The pieces, for the kernels."""
        return plan_of(self.pieces)

    @cached_property
    def longest(self) -> int:
        """The most keys that a piece sees."""
        return max((piece.seen for piece in self.pieces), default=0)

    @property
    def decoding(self) -> bool:
        """One new token a row, keys and values from the cache."""
        return self.cache is not None and self.cache.filled is not None
