"""The answer sentence follows corrected p-values and each metric's direction; figures are written by the metric."""

from types import SimpleNamespace as Given

import pytest

from luthier.report.answer import answer
from luthier.report.figures import better, figure
from luthier.report.schema import Difference


def difference(ours: str, theirs: str, value: float, p: float, corrected: float, metric: str = "bleu") -> Difference:
    low, high = value - abs(value) / 2, value + abs(value) / 2  # the interval alone would claim it
    return Difference(
        ours=ours, theirs=theirs, task="t", metric=metric, value=value, low=low, high=high, p=p, p_corrected=corrected
    )


def report(
    metric: str,
    values: dict[str, float],
    pairs: list[Difference],
    retention: list | None = None,
    losses: dict | None = None,
) -> Given:
    tunings = {
        name: Given(
            trainable_parameters=0 if "shot" in name else 10 * (place + 1),
            validation_loss=(losses or {}).get(name),
            trainable_share=0.0 if "shot" in name else 0.1,
            scores={"t": {metric: Given(value=value, signature="metric:x|n:40|more")}},
        )
        for place, (name, value) in enumerate(values.items())
    }
    return Given(task="t", metric=metric, tunings=tunings, comparisons=pairs, retention=retention or [], runs=[])


def test_a_lead_that_correction_does_not_bear_is_not_claimed() -> None:
    values = {"zero_shot": 0.30, "lora": 0.35}
    sure = report("bleu", values, [difference("lora", "zero_shot", 0.05, 0.01, 0.01)])
    assert "it beats zero_shot with 95 % confidence" in answer(sure)
    unsure = report("bleu", values, [difference("lora", "zero_shot", 0.05, 0.01, 0.12)])
    assert "its lead over zero_shot is not certain on 40 examples" in answer(unsure)


def test_the_smallest_that_cannot_be_told_from_the_best_is_chosen() -> None:
    values = {"zero_shot": 0.2, "small": 0.34, "large": 0.35}
    pairs = [
        difference("small", "zero_shot", 0.14, 0.001, 0.003),
        difference("large", "zero_shot", 0.15, 0.001, 0.003),
        difference("large", "small", 0.01, 0.04, 0.08),
    ]
    assert answer(report("bleu", values, pairs)).startswith(
        "small is the smallest tuning within noise of the best, at bleu 34.0"
    )
    pairs[-1] = difference("large", "small", 0.01, 0.004, 0.004)
    assert answer(report("bleu", values, pairs)).startswith("large is")


def test_less_perplexity_is_better() -> None:
    values = {"zero_shot": 30.0, "lora": 12.5}
    pair = difference("lora", "zero_shot", -17.5, 0.001, 0.001, "perplexity")
    assert better(pair) == "lora"
    assert better(difference("lora", "zero_shot", 17.5, 0.001, 0.001, "perplexity")) == "zero_shot"
    assert answer(report("perplexity", values, [pair])).startswith(
        "lora is the smallest tuning within noise of the best, at perplexity 12.50"
    )
    assert answer(report("perplexity", {"zero_shot": 10.0, "lora": 12.5}, [])).startswith("Prompting is enough")


def test_what_was_lost_is_said_in_the_metrics_own_unit() -> None:
    lost = [
        Given(tuning="lora", task="a", metric="accuracy", difference=-0.071, low=-0.1, high=-0.02),
        Given(tuning="lora", task="b", metric="nist", difference=-0.5, low=-0.9, high=-0.1),
        Given(tuning="lora", task="c", metric="perplexity", difference=3.0, low=1.0, high=5.0),
    ]
    text = answer(report("bleu", {"lora": 0.3}, [], lost))
    assert text.endswith("It lost 7.1 points on a and 0.50 nist on b; the perplexity on c rose by 3.00.")
    text = answer(report("bleu", {"lora": 0.3}, [], lost[2:]))
    assert text.endswith("The perplexity on c rose by 3.00.")
    kept = Given(tuning="lora", task="d", metric="accuracy", difference=0.0, low=-0.1, high=0.1)
    assert answer(report("bleu", {"lora": 0.3}, [], [kept, *lost[2:]])).endswith(
        "It lost nothing measurable on d; the perplexity on c rose by 3.00."
    )
    assert answer(report("bleu", {"lora": 0.3}, [], [kept])).endswith("It forgot nothing measurable on d.")


def test_the_best_is_chosen_on_validation_and_the_test_judges_it() -> None:
    values = {"zero_shot": 0.2, "small": 0.34, "large": 0.33}
    losses = {"zero_shot": 3.0, "small": 2.4, "large": 2.0}
    pairs = [
        difference("small", "zero_shot", 0.14, 0.001, 0.003),
        difference("large", "zero_shot", 0.13, 0.001, 0.003),
        difference("large", "small", -0.01, 0.001, 0.003),
    ]
    assert answer(report("bleu", values, pairs, losses=losses)).startswith("small is the smallest"), (
        "not worse than the best"
    )
    sizes = {"zero_shot": 0.2, "large": 0.33, "small": 0.34}  # now the better one is the larger one
    said = answer(report("bleu", sizes, pairs, losses=losses))
    assert (
        said.startswith("large is the smallest tuning within noise of the best")
        and "; on the test small did better" in said
    )
    losses["zero_shot"] = 1.0
    assert answer(report("bleu", values, pairs, losses=losses)).startswith("small is"), (
        "the prompt is beaten on the test"
    )
    assert answer(report("bleu", values, [], losses=losses)).startswith("Prompting is enough")


@pytest.mark.parametrize(
    ("value", "metric", "written"),
    [(0.34567, "bleu", "34.6"), (8.7215, "nist", "8.72"), (-0.3333, "matthews", "-33.3"), (2.0, "loss", "2.00"), (0.5, "mean", "50.0")],
)  # fmt: skip
def test_figures(value: float, metric: str, written: str) -> None:
    assert figure(value, metric) == written
    assert figure(abs(value), metric, signed=True).startswith("+")
