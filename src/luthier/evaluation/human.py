"""How well people agree: each human reference scored against the row's others, as if it were a system's answer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from luthier.metrics import metric
from luthier.metrics.score import Score


@dataclass(frozen=True)
class _Pairing:
    row: int
    answer: str
    against: tuple[str, ...]
    weight: float


def human_score(
    name: str, references: Sequence[Sequence[str]], several: Literal["best", "mean"] = "best"
) -> Score | None:
    """Leave-one-out score of the references; None where no row has two of them. A row without a second is left out.

    `best` scores a reference against all others of its row at once, as the metric treats several references; `mean`
    against each other one alone. All references of a row weigh the same and together as one example: their
    statistics are averaged, so that intervals are over rows. A system has one reference more to match than a person here.
    """
    rows = [tuple(row) for row in references if len(row) > 1]
    if not rows:
        return None
    pairings: list[_Pairing] = []
    for place, row in enumerate(rows):
        for one, answer in enumerate(row):
            others = row[:one] + row[one + 1 :]
            if several == "best":
                pairings.append(_Pairing(place, answer, others, 1 / len(row)))
            else:
                pairings += [_Pairing(place, answer, (other,), 1 / len(row) / len(others)) for other in others]
    known = metric(name)
    found = known.score([pairing.answer for pairing in pairings], [pairing.against for pairing in pairings])
    owners = np.array([pairing.row for pairing in pairings])
    weights = np.array([pairing.weight for pairing in pairings])

    def by_row(each: np.ndarray) -> np.ndarray:
        total = np.zeros((len(rows), *each.shape[1:]))
        np.add.at(total, owners, each * weights.reshape(-1, *[1] * (each.ndim - 1)))
        return total

    each = {part: by_row(values) for part, values in found.each.items()}
    return replace(
        found,
        values=by_row(found.values),
        signature=f"{found.signature}|human:leave-one-out|others:{several}",
        parts={part: float(values.mean()) for part, values in each.items()},
        each=each,
        statistics=None if found.statistics is None else by_row(found.statistics),
    )
