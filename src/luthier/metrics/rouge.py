"""ROUGE (Lin 2004), equal to the rouge-score package, whose words, stems and n-grams it takes.

Lsum splits a text into sentences and takes the union LCS per reference sentence, so it depends on
how sentences were split: here by `sentences` below, and the signature says so. With several
references the one with the best F1 counts ("best"), for each metric on its own. Longest common
subsequences are our own (`lcs`): the package's tables take minutes on long texts.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any, NamedTuple

from luthier.metrics.lcs import lcs_length, lcs_places, where
from luthier.metrics.score import Score, check_paired, mean_score

# A sentence ends at . ! or ? (and a closing quote or bracket) before white space; not after a title
# or a single initial.
_SENTENCE_END = re.compile(
    r"(?<!\bMr\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bMrs\.)(?<!\b[A-Z]\.)(?<=[.!?])[\"')\]]*\s+"
)


class Overlap(NamedTuple):
    """Precision, recall and F1 of one prediction against one reference."""

    precision: float
    recall: float
    fmeasure: float


def sentences(text: str) -> list[str]:
    """Split a text into its sentences; a newline always ends one."""
    return [part for line in text.split("\n") for part in _SENTENCE_END.split(line) if part.strip()]


def rouge(kind: str) -> Callable[[Sequence[str], Sequence[Sequence[str]]], Score]:
    """Make the metric for one of rouge1, rouge2, rougeL, rougeLsum: F1, with precision and recall as parts."""
    prepare, overlap = _kinds()[kind]

    def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
        check_paired(predictions, references)
        best = []
        for prediction, row in zip(predictions, references, strict=True):
            answer = prepare(prediction)
            best.append(max((overlap(prepare(one), answer) for one in row), key=lambda one: one.fmeasure))
        most = max(len(row) for row in references)
        signature = (
            f"metric:{kind}|measure:f1|stemmer:porter|refs:{most}|several:best"
            + ("|split:sentences" if kind == "rougeLsum" else "")
            + f"|rouge_score:{version('rouge-score')}"
        )
        precisions, recalls, f1 = zip(*best, strict=True)
        return mean_score(f1, signature, precision=precisions, recall=recalls)

    return score


def words(text: str) -> list[str]:
    """Lower-cased words of letters and digits, stemmed as rouge-score does."""
    from rouge_score.tokenize import tokenize

    found: list[str] = tokenize(text, _stemmer())
    return found


def _words_by_sentence(text: str) -> list[list[str]]:
    return [words(one) for one in sentences(text)]


def _ngrams(size: int) -> Callable[[list[str], list[str]], Overlap]:
    def overlap(reference: list[str], prediction: list[str]) -> Overlap:
        ours, theirs = (
            Counter(zip(*(side[start:] for start in range(size)), strict=False)) for side in (prediction, reference)
        )
        return _overlap((ours & theirs).total(), max(ours.total(), 1), max(theirs.total(), 1))

    return overlap


def _longest(reference: list[str], prediction: list[str]) -> Overlap:
    return _overlap(lcs_length(reference, prediction), len(prediction), len(reference))


def _summary(reference: list[list[str]], prediction: list[list[str]]) -> Overlap:
    """Union LCS by reference sentence (section 3.2); a word counts no more often than both texts have it."""
    left = Counter(word for sentence in reference for word in sentence)
    left &= Counter(word for sentence in prediction for word in sentence)
    indexed = [(sentence, where(sentence)) for sentence in prediction]
    hits = 0
    for sentence in reference:
        union = {place for one, places in indexed for place in lcs_places(sentence, one, places)}
        for place in union:
            if left[sentence[place]] > 0:
                left[sentence[place]] -= 1
                hits += 1
    return _overlap(hits, sum(map(len, prediction)), sum(map(len, reference)))


def _overlap(hits: int, of_prediction: int, of_reference: int) -> Overlap:
    if not hits:
        return Overlap(0.0, 0.0, 0.0)
    precision, recall = hits / of_prediction, hits / of_reference
    return Overlap(precision, recall, 2 * precision * recall / (precision + recall))


def _kinds() -> dict[str, tuple[Callable[[str], Any], Callable[[Any, Any], Overlap]]]:
    """How each kind reads a text, and how it compares two."""
    return {
        "rouge1": (words, _ngrams(1)),
        "rouge2": (words, _ngrams(2)),
        "rougeL": (words, _longest),
        "rougeLsum": (_words_by_sentence, _summary),
    }


@cache
def _stemmer() -> object:
    from nltk.stem import PorterStemmer

    return PorterStemmer()
