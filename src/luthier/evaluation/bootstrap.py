"""Bootstrap intervals over examples (Efron 1979) and paired differences (Koehn 2004)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % percentile interval."""

    value: float
    low: float
    high: float


def interval(values: NDArray[np.float64], seed: int = 0) -> Interval:
    """Mean of per-example values, resampled over the examples; a single example has no width."""
    means = _resampled_means(values, seed)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(ours: NDArray[np.float64], theirs: NDArray[np.float64], seed: int = 0) -> Interval:
    """Mean of ours - theirs on the same examples, with its interval: above 0 means ours is better."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return interval(ours - theirs, seed)


def _resampled_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    means: NDArray[np.float64] = values[draws].mean(axis=1)
    return means
