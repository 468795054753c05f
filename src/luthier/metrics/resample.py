"""The bootstrap over examples (Efron 1979), for metrics that are a mean over them and for those that are not.

Each example leaves one row of statistics, and a formula makes the metric from the rows' sum: BLEU from n-gram counts, macro
F1 from a confusion matrix, a mean from the values themselves. So a resample costs a sum, never a second scoring, and two
systems scored on the same examples see the same resamples: their differences are paired (Koehn 2004).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000  # enough for p-values that stay small after correcting for a hundred comparisons
_AT_ONCE = 4_000_000  # counts in memory at a time

Floats = NDArray[np.float64]
# Sums of rows (..., statistics) over so many examples -> the metric (...).
Formula = Callable[[Floats, int], Floats]


def mean(sums: Floats, examples: int) -> Floats:
    """The formula of a metric that is the mean of its per-example values, the only statistic."""
    found: Floats = sums[..., 0] / examples
    return found


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % percentile interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Sampled:
    """A metric's value, and what it came to on each resample of the examples."""

    value: float
    draws: Floats  # (RESAMPLES,)

    def interval(self) -> Interval:
        """The middle 95 % of the resamples; a single example has no width."""
        low, high = np.quantile(self.draws, (0.025, 0.975))
        return Interval(self.value, float(low), float(high))


def resample(rows: Floats, formula: Formula, seed: int | tuple[int, ...] = 0) -> Sampled:
    """The metric over all rows (examples, statistics), and over RESAMPLES draws of as many with replacement.

    The draws are a function of the number of rows and the seed alone.
    """
    count = len(rows)
    # Sums are taken from the first row on, so that equal rows give equal sums to the last bit.
    first, beyond = count * rows[0], rows - rows[0]
    random = np.random.default_rng(seed)
    found = []
    for start in range(0, RESAMPLES, chunk := max(1, _AT_ONCE // count)):
        size = min(chunk, RESAMPLES - start)
        drawn = random.integers(count, size=(size, count)) + np.arange(size)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        found.append(formula(first + times.astype(np.float64) @ beyond, count))
    value = formula((first + np.ones((1, count)) @ beyond), count)
    return Sampled(float(value[0]), np.concatenate(found))
