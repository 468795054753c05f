"""ROUGE and accuracy against the rouge package itself, published values and edges."""

import json
from pathlib import Path

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from luthier.errors import UserError
from luthier.metrics import METRICS, metric
from luthier.metrics.rouge import sentences

KINDS = ["rouge1", "rouge2", "rougeL", "rougeLsum"]


def test_sentences_split_at_ends_and_not_at_titles() -> None:
    text = 'Mr. Okafor asks Dr. Lee. "Is it J. R. Smith?" she says! Yes. At 4.30 p\nnext line'
    assert sentences(text) == [
        "Mr. Okafor asks Dr. Lee.",
        '"Is it J. R. Smith?',
        "she says!",
        "Yes.",
        "At 4.30 p",
        "next line",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_each_example_is_scored_by_the_package_and_the_best_reference_counts(kind: str) -> None:
    predictions = ["the cat sat on the mat. it slept.", "", "dogs run", "same text here"]
    references = [["a cat sat. it slept on a mat.", "no"], ["x"], ["dog running", "dogs ran"], ["same text here"]]
    scorer = RougeScorer([kind], use_stemmer=True)
    lines = lambda text: "\n".join(sentences(text)) if kind == "rougeLsum" else text  # noqa: E731
    found = metric(kind)(predictions, references)
    for place, (prediction, row) in enumerate(zip(predictions, references, strict=True)):
        best = max((scorer.score(lines(one), lines(prediction))[kind] for one in row), key=lambda s: s.fmeasure)
        assert found.values[place] == best.fmeasure
        assert found.parts["precision"][place] == best.precision
        assert found.parts["recall"][place] == best.recall
    assert found.values[1] == 0.0
    assert found.values[3] == 1.0
    assert "refs:2" in found.signature
    assert "stemmer" in found.signature


def test_dialogsum_baseline_has_its_published_scores(shared: Path) -> None:
    """BART-large's outputs against summary1: R1 45.9089, R2 21.3200, RL 38.7098; best of three 53.65/30.07/47.08."""
    folder = shared / "data" / "dialogsum"
    rows = [json.loads(line) for line in (folder / "dialogsum.test.jsonl").read_text().splitlines()]
    outputs = (folder / "test_output.txt").read_text().splitlines()
    one = [[row["summary1"]] for row in rows]
    three = [[row["summary1"], row["summary2"], row["summary3"]] for row in rows]
    for references, expected in ((one, (45.9089, 21.3200, 38.7098)), (three, (53.6521, 30.0704, 47.0841))):
        for kind, value in zip(("rouge1", "rouge2", "rougeL"), expected, strict=True):
            assert round(metric(kind)(outputs, references).value * 100, 4) == pytest.approx(value, abs=1.1e-4)


def test_accuracy_is_exact_after_strip() -> None:
    found = metric("accuracy")([" a", "b", "C"], [["a"], ["x", "b"], ["c"]])
    np.testing.assert_array_equal(found.values, [1, 1, 0])


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Unknown metric 'rogueLsum'. Did you mean 'rougeLsum'"):
        metric("rogueLsum")


@pytest.mark.parametrize("name", METRICS)
def test_long_and_empty_texts_behave(name: str) -> None:
    long = "word " * 10_000
    if name in ("rougeL", "rougeLsum"):
        long = "word " * 1_000  # quadratic
    found = metric(name)([long.strip(), "", "a"], [[long.strip()], ["a"], [""]])
    assert found.values.tolist() == [1.0, 0.0, 0.0]
