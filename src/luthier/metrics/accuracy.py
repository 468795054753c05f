"""Accuracy: the share of predictions equal to one of their references, after strip()."""

from collections.abc import Sequence

import numpy as np

from luthier.metrics.score import Measured, check_paired


def accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Measured:
    """Score 1 where the stripped prediction equals a stripped reference, else 0."""
    check_paired(predictions, references)
    hits = [
        any(prediction.strip() == reference.strip() for reference in row)
        for prediction, row in zip(predictions, references, strict=True)
    ]
    return Measured(np.array(hits, dtype=np.float64), "metric:accuracy|case:mixed|strip:yes")
