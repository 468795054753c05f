"""BLEU (Papineni et al. 2002), equal to sacrebleu: tokenization 13a, exponential smoothing, the closest reference's length.

A metric of the whole set: an example leaves its matched and possible n-grams and both lengths, and BLEU is made from their
sums. An example's own value is sacrebleu's sentence BLEU (effective order).
"""

from collections.abc import Callable, Sequence
from importlib.metadata import version

import numpy as np

from luthier.metrics.resample import Floats
from luthier.metrics.score import Score, check_paired

ORDER = 4


def bleu(*, lowercase: bool = False) -> Callable[[Sequence[str], Sequence[Sequence[str]]], Score]:
    """Make BLEU (0-1), of the texts as they are or lower-cased; parts: the brevity penalty, precisions, length ratio."""

    def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
        from sacrebleu.metrics.bleu import BLEU

        check_paired(predictions, references)
        scorer = BLEU(lowercase=lowercase, effective_order=True)
        found = [
            scorer.sentence_score(prediction, list(row))
            for prediction, row in zip(predictions, references, strict=True)
        ]
        rows = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found], dtype=np.float64)
        sums = rows.sum(axis=0)
        parts = {f"precision_{size + 1}": float(one) for size, one in enumerate(_precisions(sums))}
        parts |= {"brevity_penalty": float(_brevity(sums)), "length_ratio": float(sums[-2] / max(sums[-1], 1))}
        most = max(len(row) for row in references)
        signature = (
            f"metric:{'bleu_lc' if lowercase else 'bleu'}|refs:{most}|several:together|case:{'lc' if lowercase else 'mixed'}"
            f"|eff:no|tok:13a|smooth:exp|sacrebleu:{version('sacrebleu')}"
        )
        values = np.array([one.score / 100 for one in found])
        return Score(values, signature, parts, statistics=rows, formula=from_sums)

    return score


def from_sums(sums: Floats, examples: int) -> Floats:
    """BLEU from summed matches (4), possible n-grams (4), predicted and reference length."""
    with np.errstate(divide="ignore"):
        mean = np.exp(np.log(_precisions(sums)).mean(axis=-1))
    found: Floats = np.where(sums[..., :ORDER].any(axis=-1), _brevity(sums) * mean, 0.0)
    return found


def _precisions(sums: Floats) -> Floats:
    """Share of n-grams matched, n = 1 to 4; the k-th n without a match counts 1/2^k of one."""
    matched, possible = sums[..., :ORDER], sums[..., ORDER : 2 * ORDER]
    none = (matched == 0) & (possible > 0)
    smoothed = np.where(none, 0.5 ** np.cumsum(none, axis=-1), matched)
    found: Floats = smoothed / np.maximum(possible, 1)
    return found


def _brevity(sums: Floats) -> Floats:
    ours, theirs = sums[..., -2], sums[..., -1]
    found: Floats = np.where(ours < theirs, np.exp(1 - theirs / np.maximum(ours, 1e-9)), 1.0)
    return found
