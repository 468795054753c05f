"""Scores through a result file: the same values, intervals and pairs, for metrics of the whole set and for mixtures."""

import json

import numpy as np
import pytest
from tests.metrics.test_metrics import texts

from luthier.evaluation.bootstrap import compare, paired_difference
from luthier.evaluation.kept import MEAN, keep, keep_mean, sampled
from luthier.metrics import MODEL_METRICS, metric

NAMES = ["rouge1", "bleu", "chrf", "nist", "macro_f1", "matthews", "token_f1"]


def kept(seed: int, count: int = 30, of: int = 0) -> dict:
    """A system's scores as a result file gives them back; `of` is the seed of the references."""
    _, references = texts(count, of)
    predictions, _ = texts(count, 100 + seed)
    scores = {name: metric(name).score(predictions, references) for name in NAMES}
    scores["perplexity"] = MODEL_METRICS["perplexity"].score(np.arange(1.0, count + 1), [3] * count)
    return json.loads(json.dumps({**keep(scores), "seconds": 1.5}))


@pytest.mark.parametrize("name", [*NAMES, "perplexity"])
def test_what_is_taken_up_is_what_was_kept(name: str) -> None:
    found = kept(1)
    again = sampled({"task": found}, "task", name)
    entry = found["metrics"][name]
    interval = again.interval()
    assert (interval.value, interval.low, interval.high) == (entry["value"], entry["low"], entry["high"])
    assert entry["signature"].endswith("|n:30|interval:bootstrap95|resamples:10000|seed:0")
    assert (name in found["statistics"]) == (name not in ("rouge1", "token_f1"))


def test_pairs_of_tunings_are_drawn_together() -> None:
    ours, theirs = {"task": kept(1)}, {"task": kept(2)}
    for name in NAMES:
        found = compare(sampled(ours, "task", name), sampled(theirs, "task", name))
        assert found.value == ours["task"]["metrics"][name]["value"] - theirs["task"]["metrics"][name]["value"]
        assert compare(sampled(ours, "task", name), sampled(ours, "task", name)).p == 1
    rouge = [np.array(one["task"]["values"]["rouge1"]) for one in (ours, theirs)]
    assert compare(sampled(ours, "task", "rouge1"), sampled(theirs, "task", "rouge1")) == paired_difference(*rouge)


def test_a_mixtures_mean_draws_each_task_apart() -> None:
    scores = {"a": kept(1, 30), "b": kept(2, 50, of=7)}
    scores["both"] = keep_mean(scores, [("a", "rouge1"), ("b", "macro_f1")])
    found = sampled(scores, "both", MEAN)
    parts = [scores["a"]["metrics"]["rouge1"]["value"], scores["b"]["metrics"]["macro_f1"]["value"]]
    assert found.value == pytest.approx(sum(parts) / 2)
    entry = scores["both"]["metrics"][MEAN]
    assert entry["signature"].startswith("metric:mean|of:rouge1,macro_f1|tasks:2|resampled:by task|n:80|")
    assert (entry["low"], entry["high"]) == (found.interval().low, found.interval().high)
    assert scores["both"]["seconds"] == 3.0
    # Independent tasks: the variance of the mean is a quarter of the sum of theirs.
    each = [sampled(scores, task, name).draws.var() for task, name in (("a", "rouge1"), ("b", "macro_f1"))]
    assert found.draws.var() == pytest.approx(sum(each) / 4, rel=0.05)
    assert json.loads(json.dumps(scores)) == scores


def test_results_of_before_there_were_statistics_are_read() -> None:
    old = {"task": {"metrics": {}, "values": {"rouge1": [0.1, 0.4, 0.7]}, "seconds": 0.0}}
    assert sampled(old, "task", "rouge1").value == pytest.approx(0.4)
    assert sampled({"mix": {"values": {"mean": [0.2, 0.4]}}}, "mix", MEAN).value == pytest.approx(0.3)
