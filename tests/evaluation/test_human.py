"""The human baseline by hand, for means and for metrics of the whole set, with unequal numbers of references."""

import numpy as np
import pytest

from luthier.evaluation.human import human_score
from luthier.metrics import metric

ROWS = [["the red cat", "a red cat", "the dog"], ["alone"], ["one two three four five", "one two three four six"]]


def test_each_reference_is_scored_against_the_others_of_its_row() -> None:
    found = human_score("token_f1", ROWS)
    assert found is not None
    # red cat | red cat -> 1; red cat | red cat -> 1; dog | - -> 0: a third of the row each. The row of one is left out.
    assert found.values.tolist() == pytest.approx([2 / 3, 4 / 5])
    assert found.value == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found.parts["recall"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    mean = human_score("token_f1", ROWS, "mean")
    assert mean is not None
    assert mean.values.tolist() == pytest.approx([1 / 3, 4 / 5])
    assert "others:mean" in mean.signature
    assert "others:best" in found.signature


def test_a_metric_of_the_whole_set_weighs_every_row_as_one_example() -> None:
    """With two references a row the human BLEU has the mean statistics of both sides."""
    rows = [
        ["the cat sat on the mat", "the cat sat on a mat"],
        ["it is a sunny day here", "it was a sunny day here now"],
    ]
    bleu = metric("bleu").score
    sides = [bleu([row[one] for row in rows], [[row[1 - one]] for row in rows]) for one in (0, 1)]
    found = human_score("bleu", rows)
    assert found is not None and found.statistics is not None
    np.testing.assert_allclose(found.statistics, (sides[0].rows + sides[1].rows) / 2)
    assert found.value == pytest.approx(np.mean([side.value for side in sides]), abs=0.03)  # near their mean, not it
    interval = found.interval()
    assert interval.low <= found.value <= interval.high


def test_people_who_say_the_same_agree_entirely() -> None:
    for name in ("rougeLsum", "bleu", "chrf", "accuracy", "macro_f1"):
        found = human_score(name, [["one two three four"] * 2, ["five six seven eight"] * 3])
        assert found is not None
        assert found.value == pytest.approx(1)


def test_single_references_have_no_human_baseline() -> None:
    assert human_score("rouge1", [["a"], ["b"]]) is None
