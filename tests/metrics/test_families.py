"""Worked cases of each family, and libraries as oracles on random texts."""

import math
import subprocess

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from tests.metrics.test_metrics import texts, usable

from luthier.errors import UserError
from luthier.metrics import METRICS, MODEL_METRICS, captions, metric
from luthier.metrics.answers import squad


@pytest.mark.parametrize("name", ["bleu", "bleu_lc", "chrf", "chrf++"])
def test_corpus_scores_are_sacrebleus_on_random_texts(name: str) -> None:
    scorer = {"bleu": BLEU(), "bleu_lc": BLEU(lowercase=True), "chrf": CHRF(), "chrf++": CHRF(word_order=2)}[name]
    for seed in range(12):
        predictions, references = texts(1 + seed, seed)
        if seed == 5:
            predictions = ["zzz"] * len(predictions)
        most = max(map(len, references))
        streams = [[row[place] if place < len(row) else None for row in references] for place in range(most)]
        expected = scorer.corpus_score(predictions, streams)
        assert metric(name).score(predictions, references).value * 100 == pytest.approx(expected.score)


def test_nist_by_hand() -> None:
    """Two references of 3 words: info(the) = log2(6/2), info(cat | the) = log2(2/1) = 1, two of three words predicted."""
    found = metric("nist").score(["the cat"], [["the cat sat", "the dog ran"]])
    one = (math.log2(6 / 2) + math.log2(6 / 1)) / 2
    two = math.log2(2 / 1)
    assert found.value == pytest.approx((one + two) * 0.5)  # two thirds of the length costs half
    assert metric("nist").score(["THE cat sat"], [["the cat sat", "the dog ran"]]).value > found.value


def test_squads_words() -> None:
    assert squad("The  cat, a dog-house & An ox!") == "cat doghouse ox"
    found = metric("token_f1").score(
        ["in the city of Paris", "a", "", "blue"], [["Paris", "the city Paris"], ["the"], ["x"], ["red"]]
    )
    # words: in city of paris / city paris -> P 2/4, R 2/2; two texts of articles alone are equal
    assert found.values.tolist() == pytest.approx([2 / 3, 1, 0, 0])
    assert found.each["precision"].tolist() == [0.5, 1, 0, 0]
    assert metric("squad_exact_match").score(["The cat!", "x"], [["a cat"], ["y"]]).value == 0.5
    assert metric("exact_match").score(["The cat!", "x"], [["a cat"], ["y"]]).value == 0.0


def test_labels_have_their_published_scores() -> None:
    """The worked examples of scikit-learn's documentation: macro F1 0.2667, Matthews -0.3333."""
    f1 = metric("macro_f1").score(list("021001"), [[one] for one in "012012"])
    assert f1.value == pytest.approx(0.8 / 3)
    correlation = metric("matthews").score(["1", "-", "1", "1"], [["1"], ["1"], ["1"], ["-"]])
    assert correlation.value == pytest.approx(-1 / 3)


def test_matthews_is_the_correlation_of_the_classes() -> None:
    """For two classes it is Pearson's; for several the covariance of one-hot matrices (Gorodkin 2004)."""
    random = np.random.default_rng(0)
    for classes in ("ab", "abcd"):
        true = random.choice(list(classes), 60)
        guess = np.where(random.random(60) < 0.5, true, random.choice([*classes, "stray", "other"], 60))
        x, y = (np.stack([side == one for one in [*classes]], 1).astype(float) for side in (true, guess))
        x, y = (np.concatenate([side, 1 - side.sum(1, keepdims=True)], 1) for side in (x, y))
        cov = lambda a, b: ((a - a.mean(0)) * (b - b.mean(0))).sum()  # noqa: E731
        found = metric("matthews").score(guess.tolist(), [[one] for one in true])
        assert found.value == pytest.approx(cov(x, y) / np.sqrt(cov(x, x) * cov(y, y)))
    assert found.parts["stray"] == pytest.approx(np.isin(guess, ["stray", "other"]).mean())


def test_stray_answers_add_no_classes() -> None:
    """F1 of a is 2*1/(2+1), of b 0: their mean, however many different strays there are."""
    found = metric("macro_f1").score(["a", "junk", "trash"], [["a"], ["a"], ["b"]])
    assert found.value == pytest.approx((2 / 3 + 0) / 2)


def test_perplexity_weighs_tokens_and_loss_weighs_rows() -> None:
    nats, tokens = [2.0, 12.0], [1, 9]
    assert MODEL_METRICS["perplexity"].score(nats, tokens).value == pytest.approx(math.exp(14 / 10))
    assert MODEL_METRICS["loss"].score(nats, tokens).value == pytest.approx((2 / 1 + 12 / 9) / 2)


def test_meteor_from_statistics_is_what_the_program_makes_of_them() -> None:
    score = usable("meteor").score(*texts(25, 2))
    lines = ["EVAL ||| " + " ||| ".join(" ".join(map(str, row)) for row in score.rows)]
    jar = captions._package() / "meteor" / "meteor-1.5.jar"
    done = subprocess.run(
        ["java", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"],
        input="\n".join(lines) + "\n", capture_output=True, text=True,
    )  # fmt: skip
    *each, total = map(float, done.stdout.split())
    assert score.values.tolist() == pytest.approx(each, abs=1e-12)
    assert score.value == pytest.approx(total, abs=1e-12)


def test_a_failing_java_program_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    usable("cider")
    with pytest.raises(UserError, match="Java program .* failed on 1 texts: .*[Cc]lass"):
        captions._java(["NoSuchClass"], ["text"])


def test_caption_texts_may_hold_line_ends_and_bars() -> None:
    usable("cider")
    assert captions.ptb(("one\ntwo\u2028three\r\nfour", "", "five")) == ("one two three four", "", "five")
    found = METRICS["rougeL_caption"].score(["a ||| b"], [["a b ||| "]])
    assert found.value == pytest.approx(1.0)
