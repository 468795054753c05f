"""Packed rows laid out padded, one a line, for models that do not pack; and where their tokens then stand."""

import torch
from torch import Tensor, nn

from luthier.models.batch import Batch


def pad(packed: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(T, ...) packed rows to (rows, L, ...) with zeros behind, and the (rows, L) mask."""
    rows = list(packed.split(list(lengths)))
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    places = torch.arange(padded.shape[1], device=packed.device)
    return padded, (places < torch.tensor(lengths, device=packed.device)[:, None]).long()


def kept_index(lengths: tuple[int, ...], grown: tuple[int, ...], longest: int, device: torch.device) -> Tensor:
    """For each token of the packed rows, where it stands in the flattened padded ones."""
    pieces = [
        torch.arange(more - length, more) + row * longest
        for row, (length, more) in enumerate(zip(lengths, grown, strict=True))
    ]
    return torch.cat(pieces).to(device)


def owner_rows(batch: Batch) -> Tensor:
    """The decoder row of each target: rows are packed in order, so it follows from the lengths."""
    assert batch.decoder is not None
    ends = torch.tensor(batch.decoder.lengths, device=batch.targets.device).cumsum(0)
    return torch.searchsorted(ends, batch.targets, right=True)


def pad_index(targets: Tensor, starts: Tensor, longest: int, rows: Tensor) -> Tensor:
    """Where packed targets stand in the flattened padded rows; `starts` are the rows' first packed places."""
    return rows * longest + targets - starts[rows]


def pad_left(embedded: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(T, D) packed rows to (rows, L, D) with zeros in front, and the (rows, L) mask."""
    longest = max(lengths)
    padded = embedded.new_zeros(len(lengths), longest, embedded.shape[1])
    mask = torch.zeros(len(lengths), longest, dtype=torch.long, device=embedded.device)
    for row, piece in enumerate(embedded.split(list(lengths))):
        padded[row, longest - len(piece) :] = piece
        mask[row, longest - len(piece) :] = 1
    return padded, mask
