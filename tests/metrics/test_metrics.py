"""ROUGE, accuracy and what every metric must do: several references, edges, long texts, resamples that are the metric."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from rouge_score import rouge_scorer
from rouge_score.rouge_scorer import RougeScorer

from luthier.errors import UserError
from luthier.metrics import METRICS, MODEL_METRICS, Metric, metric
from luthier.metrics.accuracy import accuracy
from luthier.metrics.captions import needs_captions
from luthier.metrics.lcs import lcs_length, lcs_places
from luthier.metrics.rouge import sentences

KINDS = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "sits",
    "on",
    "mat",
    "rug",
    "in",
    "Paris",
    ",",
    ".",
    "and",
    "it",
    "42",
    "runs",
    "running",
]
FIXED_WEIGHTS = ("nist", "cider")  # weights of the reference set, not of the resample


def usable(name: str) -> Metric:
    """A metric, or a skip where what it needs is not installed."""
    found = metric(name)
    try:
        found.needs()
    except UserError as error:
        pytest.skip(str(error))
    return found


def texts(count: int, seed: int) -> tuple[list[str], list[list[str]]]:
    draw = random.Random(seed)
    text = lambda: " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))  # noqa: E731
    references = [[text() for _ in range(draw.randint(1, 3))] for _ in range(count)]
    return [draw.choice(row) if draw.random() < 0.4 else text() for row in references], references


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
def test_each_example_is_scored_as_by_the_package_and_the_best_reference_counts(kind: str) -> None:
    predictions, references = texts(200, 7)
    predictions += ["the cat sat on the mat. it slept.", "", "dogs run", "same text here", "!!"]
    references += [
        ["a cat sat. it slept on a mat.", "no"],
        ["x"],
        ["dog running", "dogs ran"],
        ["same text here"],
        ["x"],
    ]
    scorer = RougeScorer([kind], use_stemmer=True)
    lines = lambda text: "\n".join(sentences(text)) if kind == "rougeLsum" else text  # noqa: E731
    found = metric(kind).score(predictions, references)
    for place, (prediction, row) in enumerate(zip(predictions, references, strict=True)):
        best = max((scorer.score(lines(one), lines(prediction))[kind] for one in row), key=lambda s: s.fmeasure)
        assert found.values[place] == best.fmeasure
        assert found.each["precision"][place] == best.precision
        assert found.each["recall"][place] == best.recall
    assert found.parts["recall"] == pytest.approx(found.each["recall"].mean())
    assert "refs:3" in found.signature
    assert "stemmer" in found.signature


def test_subsequences_are_those_of_the_packages_tables() -> None:
    draw = random.Random(0)
    for _ in range(1500):
        letters = "abcdefgh"[: draw.choice([1, 2, 3, 8])]
        ours, theirs = ([draw.choice(letters) for _ in range(draw.randrange(15))] for _ in range(2))
        assert lcs_length(ours, theirs) == rouge_scorer._lcs_table(ours, theirs)[-1][-1]
        assert lcs_places(ours, theirs) == rouge_scorer.lcs_ind(ours, theirs)


def test_dialogsum_baseline_has_its_published_scores(shared: Path) -> None:
    """BART-large's outputs against summary1: R1 45.9089, R2 21.3200, RL 38.7098; best of three 53.65/30.07/47.08."""
    folder = shared / "data" / "dialogsum"
    rows = [json.loads(line) for line in (folder / "dialogsum.test.jsonl").read_text().splitlines()]
    outputs = (folder / "test_output.txt").read_text().splitlines()
    one = [[row["summary1"]] for row in rows]
    three = [[row["summary1"], row["summary2"], row["summary3"]] for row in rows]
    for references, expected in ((one, (45.9089, 21.3200, 38.7098)), (three, (53.6521, 30.0704, 47.0841))):
        for kind, value in zip(("rouge1", "rouge2", "rougeL"), expected, strict=True):
            assert round(metric(kind).score(outputs, references).value * 100, 4) == pytest.approx(value, abs=1.1e-4)


def test_accuracy_is_exact_after_strip() -> None:
    found = metric("accuracy").score([" a", "b", "C"], [["a"], ["x", "b"], ["c"]])
    np.testing.assert_array_equal(found.values, [1, 1, 0])
    assert accuracy([" a", "b", "C"], [["a"], ["x", "b"], ["c"]], strip=False).value == pytest.approx(1 / 3)


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Unknown metric 'rogueLsum'. Did you mean 'rougeLsum'"):
        metric("rogueLsum")
    with pytest.raises(UserError, match="Did you mean 'perplexity'"):
        metric("perplexty")
    assert all(metric(name) is found for name, found in {**METRICS, **MODEL_METRICS}.items())


QUICK = [name for name in METRICS if name != "meteor"]  # it loads its paraphrases for ten seconds at each call


@pytest.mark.parametrize("name", QUICK)
def test_empty_and_identical_texts_behave(name: str) -> None:
    found = usable(name)
    same, other = "A quick brown fox jumps over it", "Seven ships sail at noon today"
    right = found.score([same, other], [[same], [other, "no"]])
    if name not in ("nist", "cider"):  # no upper end that is the same for all texts
        assert right.values.tolist() == pytest.approx([1, 1])
        assert right.value == pytest.approx(1)
        assert right.interval().low == pytest.approx(1 if name != "matthews" else 0)  # one class has no correlation
    wrong = found.score([same, other], [[other], [same]])
    assert wrong.value == pytest.approx(-1.0 if name == "matthews" else 0.0, abs=0.15)
    assert wrong.value < right.value
    edges = found.score(["", same, "", same], [[same], ["", ""], [""], [same]])
    assert np.isfinite([*edges.values, edges.value, *edges.sampled.draws]).all()
    assert edges.values[0] == edges.values[1] == 0.0
    alone = found.score([""], [["x"]])
    assert alone.value == 0.0
    assert alone.interval().low == alone.interval().high == 0.0


def test_meteor_of_empty_and_identical_texts() -> None:
    same, other = "A quick brown fox jumps over it", "Seven ships sail at noon today"
    found = usable("meteor").score(
        [same, other, "", same, "", same], [[same], [same], [same], ["", ""], [""], ["no", same]]
    )
    assert found.values.tolist() == [1, 0, 0, 0, 0, 1]
    assert np.isfinite(found.sampled.draws).all()
    assert found.signature.startswith("metric:meteor|")


@pytest.mark.parametrize("name", METRICS)
def test_texts_of_ten_thousand_words_take_seconds(name: str) -> None:
    found = usable(name)
    draw = random.Random(1)
    vocabulary = [f"w{number}" for number in range(3000)]
    texts = [" ".join(draw.choices(vocabulary, k=10_000)) for _ in range(2)]
    cut = [". ".join(" ".join(text.split()[at : at + 25]) for at in range(0, 10_000, 25)) for text in texts]
    repeated = "word " * 10_000
    started = time.monotonic()
    scored = found.score([texts[0], cut[0], texts[0], repeated], [[texts[1]], [cut[1]], [texts[0]], [repeated]])
    if name == "meteor":  # its aligner could not bear 10,000 times 10,000 pairs of one word
        assert "|shortened:1|" in scored.signature
        assert scored.values[3] == 1
    assert time.monotonic() - started < (60 if name != "meteor" else 300)
    assert scored.values[2] > scored.values[0] or name in ("macro_f1", "matthews", "cider")


@pytest.mark.parametrize("name", QUICK)
def test_a_resample_is_the_metric_of_the_texts_drawn(name: str) -> None:
    """value = formula(sum of rows), and on drawn rows what scoring the drawn texts gives."""
    found = usable(name)
    predictions, references = texts(40, 3)
    if name in ("accuracy", "exact_match", "squad_exact_match", "macro_f1", "matthews"):
        draw = random.Random(5)
        predictions = [draw.choice("abcd?") for _ in predictions]
        references = [[draw.choice("abcd")] for _ in predictions]
    score = found.score(predictions, references)
    assert score.formula is found.formula
    assert score.value == pytest.approx(float(score.formula(score.rows.sum(axis=0)[None], 40)[0]))
    assert score.sampled.interval().low <= np.median(score.sampled.draws) <= score.sampled.interval().high
    if name in FIXED_WEIGHTS:
        return
    for seed in range(5):
        drawn = np.random.default_rng(seed).integers(40, size=40)
        again = found.score([predictions[one] for one in drawn], [references[one] for one in drawn])
        assert float(score.formula(score.rows[drawn].sum(axis=0)[None], 40)[0]) == pytest.approx(again.value)


@pytest.mark.parametrize("name", QUICK)
def test_scores_say_how_they_were_made(name: str) -> None:
    found = usable(name).score(["a b c d", "e"], [["a b c d"], ["e", "f"]])
    assert found.signature.startswith(f"metric:{name}|")
    assert len(found.values) == len(found.rows) == 2
    assert found.value == usable(name).score(["a b c d", "e"], [["a b c d"], ["e", "f"]]).value


def test_what_the_caption_metrics_lack_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.metrics.captions.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need the package pycocoevalcap.*pip install 'luthier\[captions\]'"):
        needs_captions()
    monkeypatch.setattr("luthier.metrics.captions.find_spec", lambda name: object())
    monkeypatch.setattr("luthier.metrics.captions.shutil.which", lambda name: None)
    with pytest.raises(UserError, match="need Java.*install a Java runtime"):
        metric("meteor").needs()
