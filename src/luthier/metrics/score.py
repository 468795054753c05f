"""What a metric returns: one value per example, so that intervals and paired tests can follow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Measured:
    """A metric over examples: values (0-1) per example, named parts, and the signature that reproduces it."""

    values: NDArray[np.float64]  # (examples,)
    signature: str
    parts: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)  # precision, recall ... each (examples,)

    @property
    def value(self) -> float:
        """The mean over the examples."""
        return float(self.values.mean())


def check_paired(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Fail on lists that cannot belong together."""
    assert len(predictions) == len(references) > 0, (len(predictions), len(references))
    assert all(len(row) > 0 for row in references), "a row without references"
