"""NIST (Doddington 2002), equal to NIST's own script mteval-v13a.pl as it stands (ASCII lower case, tokenization 13a).

    NIST = sum over n = 1..5 of (information of the matched n-grams / predicted n-grams)
           * exp(-beta ln^2 min(1, predicted words / reference words)),   beta: 0.5 at two thirds of the length
    information of w1..wn = log2(count of w1..wn-1 / count of w1..wn) in all references; for one word, of all words / its count

Where rows have unequal numbers of references the script divides their words by the largest number, not by each row's own
(other implementations do, and their brevity penalty differs): so does this. A metric of the whole set; the information
weights belong to the reference set and stay fixed when examples are resampled.
"""

import math
import string
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from luthier.metrics.resample import Floats
from luthier.metrics.score import Score, check_paired

ORDER = 5
_BETA = math.log(2) / math.log(1.5) ** 2
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)

Ngrams = Counter[tuple[str, ...]]


def nist(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """NIST over 1- to 5-grams, from 0 up (about 8 to 9 is common); an example's value uses the whole set's weights."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    check_paired(predictions, references)
    tokenizer = Tokenizer13a()

    def words(text: str) -> list[str]:
        tokens: list[str] = tokenizer(text.translate(_LOWER)).split()
        return tokens

    cut = [[words(one) for one in row] for row in references]
    counted = [[_ngrams(one) for one in row] for row in cut]
    known: Ngrams = Counter()
    for row in counted:
        for one in row:
            known.update(one)
    known[()] = sum(len(one) for row in cut for one in row)
    most = max(map(len, references))
    rows = np.zeros((len(predictions), 2 * ORDER + 1))
    for place, prediction in enumerate(predictions):
        ours = _ngrams(words(prediction))
        clipped: Ngrams = Counter()
        for one in counted[place]:
            clipped |= one
        for ngram, times in (ours & clipped).items():
            rows[place, len(ngram) - 1] += times * math.log2(known[ngram[:-1]] / known[ngram])
        for ngram, times in ours.items():
            rows[place, ORDER + len(ngram) - 1] += times
        rows[place, -1] = sum(map(len, cut[place])) / most
    signature = (
        f"metric:nist|like:mteval-v13a|n:5|case:lc|tok:13a|refs:{most}|several:together|weights:references"
        f"|sacrebleu:{version('sacrebleu')}"
    )
    sums = rows.sum(axis=0)
    parts = {"length_ratio": float(sums[ORDER] / max(sums[-1], 1e-9))}
    return Score(from_sums(rows, 1), signature, parts, statistics=rows, formula=from_sums)


def from_sums(sums: Floats, examples: int) -> Floats:
    """NIST from summed information of matches (5), predicted n-grams (5) and reference words."""
    informed = (sums[..., :ORDER] / np.maximum(sums[..., ORDER : 2 * ORDER], 1)).sum(axis=-1)
    ratio = sums[..., ORDER] / np.maximum(sums[..., -1], 1e-9)
    shortness = np.log(np.clip(ratio, 1e-300, 1))
    found: Floats = informed * np.exp(-_BETA * shortness**2)
    return found


def _ngrams(words: Sequence[str]) -> Ngrams:
    return Counter(
        tuple(words[start : start + size]) for size in range(1, ORDER + 1) for start in range(len(words) - size + 1)
    )
