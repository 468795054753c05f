"""Accuracy: the share of predictions equal to one of their references, after strip()."""

from collections.abc import Sequence

from luthier.metrics.score import Score, check_paired, mean_score


def accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]], *, strip: bool = True) -> Score:
    """Score 1 where the (stripped) prediction equals a (stripped) reference, else 0."""
    check_paired(predictions, references)
    cut = str.strip if strip else str
    hits = [
        float(any(cut(prediction) == cut(reference) for reference in row))
        for prediction, row in zip(predictions, references, strict=True)
    ]
    return mean_score(hits, f"metric:accuracy|case:mixed|strip:{'yes' if strip else 'no'}|several:any")
