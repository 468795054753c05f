"""Comparing systems on the same examples: paired bootstrap, correction for many comparisons, repeated seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from luthier.metrics.resample import Floats, Interval, Sampled, mean, resample


@dataclass(frozen=True)
class Difference(Interval):
    """Ours minus theirs with its 95 % interval, and the two-sided p-value of no difference."""

    p: float


def interval(values: Floats, seed: int = 0) -> Interval:
    """Mean of per-example values with its 95 % interval."""
    return resample(values[:, None], mean, seed).interval()


def compare(ours: Sampled, theirs: Sampled) -> Difference:
    """Paired difference of two systems scored on the same examples (Koehn 2004), for any metric.

    p inverts the percentile interval: twice the share of resamples on the lesser side of zero, ties on both sides, and one
    resample more, for p is never 0 (Davison and Hinkley 1997). So p < 0.05 where the interval leaves out zero.
    """
    draws = ours.draws - theirs.draws
    found = Sampled(ours.value - theirs.value, draws).interval()
    least = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return Difference(found.value, found.low, found.high, min(1.0, 2 * (1 + least) / (1 + len(draws))))


def paired_difference(ours: Floats, theirs: Floats, seed: int = 0) -> Difference:
    """`compare` for a metric that is the mean of per-example values: above 0 means ours has more."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return compare(resample(ours[:, None], mean, seed), resample(theirs[:, None], mean, seed))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down correction: with these, one false claim in all is made with the chance that is named."""
    found = np.empty(len(p))
    order = np.argsort(p, kind="stable")
    found[order] = np.maximum.accumulate([p[place] * (len(p) - rank) for rank, place in enumerate(order)])
    return [float(one) for one in np.minimum(found, 1.0)]


@dataclass(frozen=True)
class Repeated:
    """One tuning trained with several seeds: the mean, its spread over seeds, and resamples of examples and seeds."""

    sampled: Sampled
    spread: float  # standard deviation over the seeds, n - 1

    def interval(self) -> Interval:
        """The mean over the seeds with its 95 % interval, over examples and seeds."""
        return self.sampled.interval()


def over_seeds(runs: Sequence[Sampled], seed: int = 0) -> Repeated:
    """Put together one tuning's scores of several seeds on the same examples.

    Both are resampled: the examples (the runs' own draws) and which seeds there are. With few seeds the interval is a
    little narrow, as every bootstrap of few things is. Compare two such by `compare`: with one `seed` their runs are
    paired in order (the same training seeds), with two they are drawn apart.
    """
    values = np.array([run.value for run in runs])
    draws = np.stack([run.draws for run in runs])  # (seeds, resamples)
    chosen = np.random.default_rng((seed, 1)).integers(len(runs), size=draws.shape)
    mixed = np.take_along_axis(draws, chosen, axis=0).mean(axis=0)
    spread = float(values.std(ddof=1)) if len(runs) > 1 else 0.0
    return Repeated(Sampled(float(values.mean()), mixed), spread)
