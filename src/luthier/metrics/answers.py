"""Short answers: exact match, and the token F1 of SQuAD (Rajpurkar et al. 2016); of several references the best counts."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from luthier.metrics.score import Score, check_paired, mean_score

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def plain(text: str) -> str:
    """Lower case without ASCII punctuation, white space made single: as Tk-Instruct compares."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def squad(text: str) -> str:
    """The same without articles: as SQuAD's script compares."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(
    name: str, normalise: Callable[[str], str]
) -> Callable[[Sequence[str], Sequence[Sequence[str]]], Score]:
    """Make the share of predictions equal to a reference once both are normalised."""

    def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
        check_paired(predictions, references)
        hits = [
            float(any(normalise(prediction) == normalise(one) for one in row))
            for prediction, row in zip(predictions, references, strict=True)
        ]
        return mean_score(hits, f"metric:{name}|{_described(normalise)}|several:any")

    return score


def token_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """F1 of the normalised words both texts have, with precision and recall as parts; two empty texts agree."""
    check_paired(predictions, references)
    best = [
        max((_f1(squad(prediction).split(), squad(one).split()) for one in row), key=lambda one: one[0])
        for prediction, row in zip(predictions, references, strict=True)
    ]
    f1, precisions, recalls = zip(*best, strict=True)
    return mean_score(f1, f"metric:token_f1|{_described(squad)}|several:best", precision=precisions, recall=recalls)


def _f1(ours: list[str], theirs: list[str]) -> tuple[float, float, float]:
    if not ours or not theirs:
        same = float(ours == theirs)
        return same, same, same
    both = (Counter(ours) & Counter(theirs)).total()
    precision, recall = both / len(ours), both / len(theirs)
    return (2 * precision * recall / (precision + recall) if both else 0.0), precision, recall


def _described(normalise: Callable[[str], str]) -> str:
    return "case:lc|punctuation:no" + ("|articles:no" if normalise is squad else "")
