import numpy as np

from luthier.evaluation.bootstrap import interval, paired_difference


def test_the_interval_is_that_of_the_normal_theory_on_a_large_sample() -> None:
    values = np.random.default_rng(1).normal(0.4, 0.2, 400)
    found = interval(values)
    half = 1.96 * values.std() / 20
    assert found.value == values.mean()
    np.testing.assert_allclose([found.low, found.high], [values.mean() - half, values.mean() + half], atol=0.003)


def test_it_is_the_same_each_time_and_has_no_width_without_spread() -> None:
    values = np.random.default_rng(2).random(30)
    assert interval(values) == interval(values)
    flat = interval(np.full(9, 0.25))
    assert (flat.low, flat.high) == (0.25, 0.25)


def test_two_copies_of_a_system_differ_in_about_one_trial_of_twenty() -> None:
    """A/A check: exchangeable systems are called different in about 5 % of trials."""
    random = np.random.default_rng(3)
    trials, called = 400, 0
    for _ in range(trials):
        hard = random.random(60)
        ours, theirs = hard + random.normal(0, 0.1, (2, 60))
        found = paired_difference(ours, theirs)
        called += found.low > 0 or found.high < 0
    assert 0.02 <= called / trials <= 0.09


def test_pairing_sees_what_the_spread_between_examples_hides() -> None:
    hard = np.random.default_rng(4).random(40)
    better = hard + 0.02 + np.random.default_rng(5).normal(0, 0.02, 40)
    assert paired_difference(better, hard).low > 0
    assert interval(better).low < interval(hard).high
