"""Intervals, paired differences, corrected p-values and repeated seeds, for means and for metrics of the whole set."""

import math

import numpy as np
import pytest

from luthier.evaluation.bootstrap import compare, holm, interval, over_seeds, paired_difference
from luthier.metrics import metric
from luthier.metrics.resample import RESAMPLES, mean, resample


def test_the_interval_is_that_of_the_normal_theory_on_a_large_sample() -> None:
    values = np.random.default_rng(1).normal(0.4, 0.2, 400)
    found = interval(values)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    np.testing.assert_allclose([found.low, found.high], [values.mean() - half, values.mean() + half], atol=0.003)


def test_it_is_the_same_each_time_and_has_no_width_without_spread() -> None:
    values = np.random.default_rng(2).random(30)
    assert interval(values) == interval(values)
    for flat in (0.25, 0.1, 1 / 3):
        found = interval(np.full(9, flat))
        assert found.low == found.value == found.high == pytest.approx(flat)


def test_resamples_are_the_same_however_many_rows_are_summed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(3).integers(9, size=(50, 3)).astype(float)
    formula = lambda sums, count: sums[..., 0] / sums[..., 1] + sums[..., 2] / count  # noqa: E731
    whole = resample(rows, formula)
    monkeypatch.setattr("luthier.metrics.resample._AT_ONCE", 900)
    np.testing.assert_array_equal(resample(rows, formula).draws, whole.draws)
    drawn = np.random.default_rng(0).integers(50, size=(RESAMPLES, 50))
    np.testing.assert_allclose(whole.draws[:20], [formula(rows[one].sum(axis=0), 50) for one in drawn[:20]])


def trials_called_different(draw, trials: int) -> float:
    return sum(draw().p < 0.05 for _ in range(trials)) / trials


def test_two_copies_of_a_system_differ_in_about_one_trial_of_twenty() -> None:
    """A/A: exchangeable systems are called different in about 5 % of trials.

    Of 600 trials a test of exactly 5 % calls 30, with a standard deviation of 5.3; the bootstrap of 60 examples
    is known to call a little too many (its interval is that of a normal with n, not n - 1: 5.6 %). From 3 to 8 % is
    three deviations to either side.
    """
    random = np.random.default_rng(3)

    def draw():
        ours, theirs = random.random(60) + random.normal(0, 0.1, (2, 60))
        return paired_difference(ours, theirs)

    assert 0.03 <= trials_called_different(draw, 600) <= 0.08


def test_so_do_they_by_a_metric_of_the_whole_set() -> None:
    """A/A for macro F1: both systems are right in 60 % of cases, with errors of their own."""
    random = np.random.default_rng(4)
    labels = np.array(list("abc"))

    def draw():
        true = random.choice(labels, 80)
        sides = [np.where(random.random(80) < 0.6, true, random.choice(labels, 80)) for _ in range(2)]
        ours, theirs = (metric("macro_f1").score(side.tolist(), [[one] for one in true]) for side in sides)
        return compare(ours.sampled, theirs.sampled)

    assert 0.02 <= trials_called_different(draw, 300) <= 0.09  # 300 trials: a deviation of 1.3 %


def test_pairing_sees_what_the_spread_between_examples_hides() -> None:
    hard = np.random.default_rng(4).random(40)
    better = hard + 0.02 + np.random.default_rng(5).normal(0, 0.02, 40)
    found = paired_difference(better, hard)
    assert found.low > 0
    assert found.p < 0.001
    assert interval(better).low < interval(hard).high


def test_p_and_the_interval_agree_and_a_system_does_not_differ_from_itself() -> None:
    random = np.random.default_rng(6)
    for shift in np.linspace(0, 0.1, 30):
        ours, theirs = random.normal(0, 0.15, (2, 50))
        found = paired_difference(ours + shift, theirs)
        if abs(found.p - 0.05) > 0.002:
            assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
        back = paired_difference(theirs, ours + shift)
        assert (back.value, back.low, back.high, back.p) == pytest.approx(
            (-found.value, -found.high, -found.low, found.p)
        )
    same = paired_difference(ours, ours)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    # A difference in every example: the least p there is.
    assert paired_difference(ours + 1, ours).p == 2 / (RESAMPLES + 1)


def test_p_is_near_the_t_tests_on_a_normal_sample() -> None:
    ours, theirs = np.random.default_rng(8).normal(0, 1, (2, 200))
    each = ours - theirs
    z = abs(each.mean()) / (each.std(ddof=1) / math.sqrt(200))
    assert paired_difference(ours, theirs).p == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.02)


def test_a_paired_difference_of_bleu_is_that_of_the_drawn_texts() -> None:
    references = [
        [f"the {word} is on the mat near the door {n}"]
        for n, word in enumerate(["cat", "dog", "fox", "hen", "cow", "pig"])
    ]
    ours = [row[0] if n % 2 else row[0].replace("near", "by") for n, row in enumerate(references)]
    theirs = [row[0].replace("the mat", "a mat") for row in references]
    bleu = metric("bleu").score
    found = compare(bleu(ours, references).sampled, bleu(theirs, references).sampled)
    drawn = np.random.default_rng(0).integers(6, size=(RESAMPLES, 6))
    slow = [
        bleu([ours[n] for n in one], [references[n] for n in one]).value
        - bleu([theirs[n] for n in one], [references[n] for n in one]).value
        for one in drawn[:25]
    ]
    fast = bleu(ours, references).sampled.draws[:25] - bleu(theirs, references).sampled.draws[:25]
    np.testing.assert_allclose(fast, slow, atol=1e-12)
    assert found.value == bleu(ours, references).value - bleu(theirs, references).value


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1, never falling, at most 1."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_holm_keeps_false_claims_to_five_percent_of_reports() -> None:
    """Ten systems that are one: of 45 pairs some p is below 5 % in most reports, a corrected one in few."""
    random = np.random.default_rng(9)
    plain, corrected, reports = 0, 0, 60
    for _ in range(reports):
        hard = random.random(80)
        sampled = [resample((hard + random.normal(0, 0.2, 80))[:, None], mean) for _ in range(10)]
        p = [compare(a, b).p for place, a in enumerate(sampled) for b in sampled[:place]]
        plain += min(p) < 0.05
        corrected += min(holm(p)) < 0.05
    assert plain / reports > 0.4
    assert corrected / reports <= 0.15  # 5 % expected; 60 reports: three deviations above


def test_seeds_are_put_together() -> None:
    random = np.random.default_rng(10)
    hard = random.random(100)
    runs = [resample((hard + shift)[:, None], mean) for shift in (0.0, 0.1, 0.2)]
    found = over_seeds(runs)
    assert found.sampled.value == pytest.approx(hard.mean() + 0.1)
    assert found.spread == pytest.approx(0.1)
    # Examples and seeds vary apart, so their variances add; that of 3 seeds is their own over 3 (of n, not n - 1).
    expected = math.sqrt(hard.var() / 100 + np.var([0, 0.1, 0.2]) / 3)
    assert found.sampled.draws.std() == pytest.approx(expected, rel=0.05)
    alone = over_seeds(runs[:1])
    assert alone.interval() == runs[0].interval()
    assert alone.spread == 0.0
    assert compare(over_seeds(runs, seed=1).sampled, over_seeds(runs, seed=2).sampled).p > 0.5
