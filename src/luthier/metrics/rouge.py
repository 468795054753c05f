"""ROUGE (Lin 2004), computed by the rouge-score package.

Lsum splits a text into sentences and takes the union LCS per reference sentence, so it depends on
how sentences were split: here by `sentences` below, and the signature says so. With several
references the one with the best F1 counts ("best"), for each metric on its own.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from luthier.metrics.score import Measured, check_paired

# A sentence ends at . ! or ? (and a closing quote or bracket) before white space; not after a title
# or a single initial.
_SENTENCE_END = re.compile(
    r"(?<!\bMr\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bMrs\.)(?<!\b[A-Z]\.)(?<=[.!?])[\"')\]]*\s+"
)


def sentences(text: str) -> list[str]:
    """Split a text into its sentences; a newline always ends one."""
    return [part for line in text.split("\n") for part in _SENTENCE_END.split(line) if part.strip()]


def rouge(kind: str) -> Callable[[Sequence[str], Sequence[Sequence[str]]], Measured]:
    """Make the metric for one of rouge1, rouge2, rougeL, rougeLsum: F1, with precision and recall as parts."""

    def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Measured:
        check_paired(predictions, references)
        scorer = _scorer(kind)
        prepare = _one_sentence_a_line if kind == "rougeLsum" else str
        best = []
        for prediction, row in zip(predictions, references, strict=True):
            scores = [scorer.score(prepare(reference), prepare(prediction))[kind] for reference in row]
            best.append(max(scores, key=lambda one: one.fmeasure))
        most = max(len(row) for row in references)
        signature = (
            f"metric:{kind}|measure:f1|stemmer:porter|refs:{most}|several:best"
            + ("|split:sentences" if kind == "rougeLsum" else "")
            + f"|rouge_score:{version('rouge-score')}"
        )
        return Measured(
            np.array([one.fmeasure for one in best]),
            signature,
            {
                "precision": np.array([one.precision for one in best]),
                "recall": np.array([one.recall for one in best]),
            },
        )

    return score


def _one_sentence_a_line(text: str) -> str:
    return "\n".join(sentences(text))


@cache
def _scorer(kind: str) -> RougeScorer:
    return RougeScorer([kind], use_stemmer=True)
