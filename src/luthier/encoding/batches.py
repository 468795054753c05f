"""How rows are divided into micro-batches and laid out as tensors.

Micro-batches divide an optimizer's batch by a token budget: that is memory only, and never changes the gradient.
"""

from collections.abc import Callable, Sequence

import torch

from luthier.encoding.encoder import Encoded, Encoder
from luthier.models.batch import Batch, Packed, common_start


def micro_batches(rows: Sequence[Encoded], budget: int, padded: bool) -> list[list[Encoded]]:
    """Divide rows into groups of similar length within a token budget (a longer row goes alone).

    There are as few as the budget allows, and they are about equal: the largest decides the memory.
    """
    ordered = sorted(rows, key=len, reverse=True)
    found = _within(ordered, budget, padded)
    least, most = 0, budget  # the smallest budget for as many groups is in (least, most]
    while most - least > 1:
        middle = (least + most) // 2
        groups = _within(ordered, middle, padded)
        if len(groups) > len(found):
            least = middle
        else:
            found, most = groups, middle
    return found


def _within(rows: Sequence[Encoded], budget: int, padded: bool) -> list[list[Encoded]]:
    groups: list[list[Encoded]] = []
    tokens = 0
    for row in rows:
        # Padded, every row costs as much as the longest, which came first.
        cost = len(groups[-1][0]) if padded and groups and groups[-1] else len(row)
        if not groups or tokens + cost > budget:
            groups.append([])
            tokens, cost = 0, len(row)
        groups[-1].append(row)
        tokens += cost
    return groups


def collate(rows: Sequence[Encoded], decoder_start: int | None, fork: bool = False) -> Batch:
    """Lay rows out as one packed batch; `decoder_start` is given for encoder-decoders.

    `fork` computes what all rows begin with (a chat's system text, a template's instruction, shots) once: one row with a
    branch for each. Losses and gradients are the same sums.
    """
    labels = torch.tensor([token for row in rows for token in row.labels])
    owners = torch.tensor([place for place, row in enumerate(rows) for _ in row.labels])
    ids = tuple(row.id for row in rows)
    known = [row.states for row in rows if row.states is not None]
    frozen = rows[0].frozen if rows and len(known) == len(rows) else 0
    if decoder_start is not None:
        inputs = [token for row in rows for token in (decoder_start, *row.target[:-1])]
        return Batch(
            ids=ids,
            source=_packed([row.prompt for row in rows]),
            decoder=Packed(torch.tensor(inputs), tuple(len(row.target) for row in rows)),
            decoder_rows=tuple(range(len(rows))),
            targets=torch.arange(len(labels)),
            labels=labels,
            owners=owners,
            states=torch.cat(known) if frozen else None,
            frozen=frozen,
        )
    # The end token is predicted, never read: the last input is the last token of the completion.
    sequences = [row.prompt + row.target[:-1] for row in rows]
    shared = common_start(sequences, min(map(_first_state, rows))) if fork else 0
    targets, start = [], 0
    for row, sequence in zip(rows, sequences, strict=True):
        targets += [torch.arange(start + first - 1, start + stop - 1) for first, stop in row.earlier]
        targets.append(torch.arange(start + len(row.prompt) - 1, start + len(sequence)))
        start += len(sequence) - shared  # the next one's shared part would stand before its branch
    source = _packed(sequences)
    if shared:
        branches = tuple(len(sequence) - shared for sequence in sequences)
        ids_ = sequences[0][:shared] + [token for sequence in sequences for token in sequence[shared:]]
        source = Packed(torch.tensor(ids_), (len(ids_),), (branches,))
    states = torch.cat([known[0][:shared], *(one[shared:] for one in known)]) if frozen else None
    return Batch(
        ids=ids,
        source=source,
        targets=torch.cat(targets),
        labels=labels,
        owners=owners,
        states=states,
        frozen=frozen,
    )


def _first_state(row: Encoded) -> int:
    """Where the first state that predicts a target stands."""
    return (row.earlier[0][0] if row.earlier else len(row.prompt)) - 1


def collate_choices(
    rows: Sequence[tuple[str, list[int], list[list[int]]]], decoder_start: int | None
) -> tuple[Batch, list[tuple[int, int]]]:
    """Lay out questions with their answer choices so that each prompt is computed once.

    `rows` holds (id, prompt ids, token ids of each choice). Returns the batch and (row, choice) for
    each choice, in the order its labels stand in the batch.
    """
    labels: list[int] = []
    places: list[tuple[int, int]] = []
    for place, (_, _, choices) in enumerate(rows):
        for number, choice in enumerate(choices):
            labels.extend(choice)
            places.append((place, number))
    ids = tuple(row for row, _, _ in rows)
    owners = torch.tensor([place for place, (_, _, choices) in enumerate(rows) for choice in choices for _ in choice])
    if decoder_start is not None:
        inputs = [[decoder_start, *choice[:-1]] for _, _, choices in rows for choice in choices]
        batch = Batch(
            ids=ids,
            source=_packed([prompt for _, prompt, _ in rows]),
            decoder=_packed(inputs),
            decoder_rows=tuple(place for place, _ in places),
            targets=torch.arange(len(labels)),
            labels=torch.tensor(labels),
            owners=owners,
        )
        return batch, places
    sequences: list[list[int]] = []
    branches, targets, start = [], [], 0
    for _, prompt, choices in rows:
        last, cursor = start + len(prompt) - 1, start + len(prompt)
        for choice in choices:
            targets += [last, *range(cursor, cursor + len(choice) - 1)]
            cursor += len(choice) - 1
        sequences.append(prompt + [token for choice in choices for token in choice[:-1]])
        branches.append(tuple(len(choice) - 1 for choice in choices))
        start = cursor
    batch = Batch(
        ids=ids,
        source=Packed(
            torch.tensor([token for sequence in sequences for token in sequence]),
            tuple(map(len, sequences)),
            tuple(branches) if any(len(choices) > 1 for _, _, choices in rows) else (),
        ),
        targets=torch.tensor(targets),
        labels=torch.tensor(labels),
        owners=owners,
    )
    return batch, places


def encode_all(
    encoder: Encoder, examples: Sequence, reserve: int = 0, on_cut: Callable[[Encoded], None] | None = None
) -> list[Encoded]:
    """Encode examples, telling of each whose prompt had to be cut."""
    rows = [row for example in examples for row in encoder.encode_all(example, reserve)]
    for row in rows:
        if row.cut and on_cut:
            on_cut(row)
    return rows


def _packed(sequences: Sequence[Sequence[int]]) -> Packed:
    flat = [token for sequence in sequences for token in sequence]
    return Packed(torch.tensor(flat), tuple(map(len, sequences)))
