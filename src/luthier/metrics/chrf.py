"""chrF (Popović 2015) and chrF++ (2017), equal to sacrebleu: character 6-grams, recall weighted twice, no white space.

A metric of the whole set: precision and recall come from n-gram counts summed over the examples, each against the reference
that suits it best.
"""

from collections.abc import Callable, Sequence
from importlib.metadata import version

import numpy as np

from luthier.metrics.resample import Floats
from luthier.metrics.score import Score, check_paired

BETA = 2


def chrf(*, word_order: int = 0) -> Callable[[Sequence[str], Sequence[Sequence[str]]], Score]:
    """Make chrF (0-1): with `word_order` 2 it is chrF++."""

    def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
        from sacrebleu.metrics.chrf import CHRF

        check_paired(predictions, references)
        scorer = CHRF(word_order=word_order, beta=BETA)
        # sacrebleu's own bootstrap takes its rows from here too: nothing public gives them.
        rows = np.array(
            [
                scorer._extract_corpus_statistics([prediction], [[one] for one in row])[0]
                for prediction, row in zip(predictions, references, strict=True)
            ],
            dtype=np.float64,
        )
        most = max(len(row) for row in references)
        signature = (
            f"metric:chrf{'+' * word_order}|refs:{most}|several:best|case:mixed|eff:yes|nc:6|nw:{word_order}|space:no"
            f"|sacrebleu:{version('sacrebleu')}"
        )
        return Score(from_sums(rows, 1), signature, statistics=rows, formula=from_sums)

    return score


def from_sums(sums: Floats, examples: int) -> Floats:
    """ChrF from summed n-grams of each order: predicted, in the reference, matched."""
    ours, theirs, matched = (sums[..., start::3] for start in range(3))
    both = (ours > 0) & (theirs > 0)
    orders = np.maximum(both.sum(axis=-1), 1)
    precision = np.where(both, matched / np.maximum(ours, 1), 0).sum(axis=-1) / orders
    recall = np.where(both, matched / np.maximum(theirs, 1), 0).sum(axis=-1) / orders
    below = BETA**2 * precision + recall
    found: Floats = np.where(below > 0, (1 + BETA**2) * precision * recall / np.where(below > 0, below, 1), 0.0)
    return found
