"""What a metric returns: its value, each example's, and the rows of statistics from which intervals follow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from luthier.metrics.resample import Floats, Formula, Interval, Sampled, mean, resample


@dataclass(frozen=True)
class Score:
    """A metric over examples, with the signature that reproduces it.

    `values` are the examples' own scores. A metric of the whole set (BLEU, macro F1) is no mean of these: it is `formula` of
    the summed `statistics`. `parts` are what a value is made of (precision, recall ...), `each` those by example.
    """

    values: Floats  # (examples,)
    signature: str
    parts: Mapping[str, float] = field(default_factory=dict)
    each: Mapping[str, Floats] = field(default_factory=dict)
    statistics: Floats | None = None  # (examples, statistics); None: the values are the only one
    formula: Formula = mean

    @property
    def rows(self) -> Floats:
        """One row of statistics for each example."""
        return self.values[:, None] if self.statistics is None else self.statistics

    @property
    def value(self) -> float:
        """The metric over all examples."""
        return self.sampled.value

    @cached_property
    def sampled(self) -> Sampled:
        """The value with its bootstrap resamples."""
        return resample(self.rows, self.formula)

    def interval(self) -> Interval:
        """The value with its 95 % bootstrap interval."""
        return self.sampled.interval()


def mean_score(values: Sequence[float] | Floats, signature: str, **each: Sequence[float]) -> Score:
    """The score of a metric that is the mean over the examples, as its parts are."""
    parts = {name: np.array(part, dtype=np.float64) for name, part in each.items()}
    return Score(
        np.array(values, dtype=np.float64), signature, {name: float(part.mean()) for name, part in parts.items()}, parts
    )


def check_paired(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Fail on lists that cannot belong together."""
    assert len(predictions) == len(references) > 0, (len(predictions), len(references))
    assert all(len(row) > 0 for row in references), "a row without references"
