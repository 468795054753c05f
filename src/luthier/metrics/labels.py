"""Class labels: macro F1 and Matthews correlation, both of the whole set's confusion matrix.

The classes are the references' labels. A prediction that is none of them is wrong, and counts as one class more
that is never right: a model's stray texts do not add classes of their own. Of several references the one that is met counts.
"""

from collections.abc import Sequence

import numpy as np

from luthier.metrics.resample import Floats
from luthier.metrics.score import Score, check_paired


def macro_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Mean over the classes of 2 hits / (predicted + true); an example's value is whether it is right."""
    return _scored("macro_f1", predictions, references)


def matthews(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Matthews correlation (-1 to 1; Gorodkin 2004 for several classes); an example's value is whether it is right."""
    return _scored("matthews", predictions, references)


def macro_f1_from_sums(sums: Floats, examples: int) -> Floats:
    """Macro F1 from hits, true and predicted counts of each class; classes that no example has are left out."""
    hits, true, predicted = np.split(sums, 3, axis=-1)
    there = true > 0
    f1 = np.where(there, 2 * hits / np.maximum(true + predicted, 1), 0)
    found: Floats = f1.sum(axis=-1) / there.sum(axis=-1)
    return found


def matthews_from_sums(sums: Floats, examples: int) -> Floats:
    """Correlation of the one-hot true and predicted classes; 0 where either is always the same."""
    hits, true, predicted = np.split(sums, 3, axis=-1)
    other = examples - predicted.sum(axis=-1)
    both = hits.sum(axis=-1) * examples - (true * predicted).sum(axis=-1)
    spread_true = examples**2 - (true**2).sum(axis=-1)
    spread_predicted = examples**2 - (predicted**2).sum(axis=-1) - other**2
    below = np.sqrt(spread_true * spread_predicted)
    found: Floats = np.where(below > 0, both / np.where(below > 0, below, 1), 0.0)
    return found


def _scored(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    check_paired(predictions, references)
    guesses = [prediction.strip() for prediction in predictions]
    true = [
        guess if guess in (row := [one.strip() for one in given]) else row[0]
        for guess, given in zip(guesses, references, strict=True)
    ]
    classes = {label: place for place, label in enumerate(sorted({*true, *(row[0].strip() for row in references)}))}
    rows = np.zeros((len(guesses), 3, len(classes)))
    for place, (guess, label) in enumerate(zip(guesses, true, strict=True)):
        rows[place, 0, classes[label]] = guess == label
        rows[place, 1, classes[label]] = 1
        if guess in classes:
            rows[place, 2, classes[guess]] = 1
    stray = sum(guess not in classes for guess in guesses)
    return Score(
        rows[:, 0].sum(axis=-1),
        f"metric:{name}|classes:{len(classes)}|case:mixed|strip:yes|several:any",
        {"stray": stray / len(guesses)},
        statistics=rows.reshape(len(guesses), -1),
        formula=macro_f1_from_sums if name == "macro_f1" else matthews_from_sums,
    )
