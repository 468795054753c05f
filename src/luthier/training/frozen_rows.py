"""Training rows with the states of the frozen blocks below a tuning, computed once and kept on disk."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.cached import cache_folder, cached, code_digest, digest, installed
from luthier.data.lazy import Lazy
from luthier.encoding.batches import collate, micro_batches
from luthier.encoding.encoder import Encoded
from luthier.encoding.stored import StoredRows
from luthier.errors import UserError
from luthier.models.base import BaseModel
from luthier.models.frozen import SLICED, frozen_blocks, frozen_states
from luthier.models.kernels.calls import kernels_for

# Tokens that run at once while the states are made.
TOKENS = 4096
# Of the free space, what the states may take.
SHARE = 0.9


class FrozenRows(Lazy[Encoded]):
    """Stored rows, each with its states mapped from a file."""

    def __init__(self, rows: StoredRows, folder: Path, blocks: int, dtype: torch.dtype, width: int, decoder: bool):
        self.rows, self.blocks, self._dtype = rows, blocks, dtype
        self._ends = np.cumsum(_lengths(rows, decoder))
        shape = (int(self._ends[-1]), width)
        self._file = np.memmap(folder / "states.bin", dtype=_stored_type(dtype), mode="r", shape=shape)

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, place: int) -> Encoded:
        """The row at `place` with its states (T, D)."""
        start = int(self._ends[place - 1]) if place else 0
        states = torch.from_numpy(np.array(self._file[start : int(self._ends[place])])).view(self._dtype)
        return replace(self.rows[place], states=states, frozen=self.blocks)


def frozen_rows(base: BaseModel, name: str, rows: StoredRows, say: Callable[[str], None]) -> StoredRows | FrozenRows:
    """The rows with the states of all that lies below the tuning `name`, made where no earlier call made the same.

    `say` is told how much space they take, or why there are none. Raises UserError where the disk is too small.
    """
    blocks = frozen_blocks(base, name)
    if not blocks:
        known = base.encoder_decoder or base.family in SLICED
        why = "this tuning reaches down to the embeddings, so nothing below it can be kept"
        if not known:
            why = f"where the blocks of a {base.family} model may be cut is not known (it is for {', '.join(sorted(SLICED))})"
        say(f"frozen_cache: {why}; it trains as without")
        return rows
    decoder = not base.encoder_decoder
    size = int(_lengths(rows, decoder).sum()) * base.width * base.dtype.itemsize
    key = digest(
        [
            rows.folder.name, base.fingerprint(), base.quantized, str(base.dtype), base.device.type, blocks,
            code_digest("luthier.models"), installed("torch"), installed("transformers"),
            kernels_for(base.embedding.weight) is not None,
        ]
    )  # fmt: skip
    place = cached("states", key, lambda folder: _make(base, rows, blocks, folder, size, say))
    return FrozenRows(rows, place, blocks, base.dtype, base.width, decoder)


def _make(base: BaseModel, rows: StoredRows, blocks: int, folder: Path, size: int, say: Callable[[str], None]) -> None:
    free = shutil.disk_usage(cache_folder()).free
    what = f"the states of {len(rows)} rows after {blocks} frozen blocks take {size / 1e9:.2f} GB"
    if size > SHARE * free:
        raise UserError(
            f"frozen_cache: {what}, and {cache_folder()} has {free / 1e9:.2f} GB free. Free some space, set LUTHIER_CACHE to a "
            "folder with more, or set frozen_cache: false."
        )
    say(f"{what} in {cache_folder()}")
    ends = np.cumsum(_lengths(rows, not base.encoder_decoder))
    shape = (int(ends[-1]), base.width)
    file = np.memmap(folder / "states.bin", dtype=_stored_type(base.dtype), mode="w+", shape=shape)
    numbered = [replace(rows[place], id=str(place)) for place in range(len(rows))]
    for group in micro_batches(numbered, TOKENS, padded=base.pads):
        batch = collate(group, base.decoder_start if base.encoder_decoder else None).to(base.device)
        states = frozen_states(base, batch.source, blocks).to(base.dtype).cpu()
        for row, piece in zip(group, states.split(list(batch.source.lengths)), strict=True):
            stop = int(ends[int(row.id)])
            file[stop - len(piece) : stop] = _plain(piece)
    file.flush()


def _lengths(rows: StoredRows, decoder: bool) -> np.ndarray:
    """States of each row: of all that a decoder reads (all but the end token), or of an encoder's input."""
    return rows.lengths() - 1 if decoder else rows.prompt_lengths()


def _stored_type(dtype: torch.dtype) -> Any:
    return np.dtype("<f4") if dtype == torch.float32 else np.dtype("<i2")


def _plain(states: Tensor) -> np.ndarray:
    found: np.ndarray = (states if states.dtype == torch.float32 else states.view(torch.int16)).numpy()
    return found
