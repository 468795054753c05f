"""Every metric against values that its reference implementation gave."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.metrics.test_metrics import usable

from luthier.evaluation.human import human_score
from luthier.metrics import metric
from luthier.metrics.accuracy import accuracy
from luthier.metrics.captions import ptb


@pytest.fixture(scope="module")
def gold(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "gold" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def e2e(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "gold" / "e2e_metrics.json").read_text())


@pytest.fixture(scope="module")
def dialogsum(shared: Path) -> tuple[list[str], list[list[str]]]:
    folder = shared / "data" / "dialogsum"
    rows = [json.loads(line) for line in (folder / "dialogsum.test.jsonl").read_text().splitlines()[:40]]
    return (folder / "test_output.txt").read_text().splitlines()[:40], [
        [row[f"summary{number}"] for number in (1, 2, 3)] for row in rows
    ]


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
def test_rouge_on_forty_dialogues(gold: dict, dialogsum: tuple, kind: str) -> None:
    outputs, references = dialogsum
    expected = gold["rouge_dialogsum40"]["expected"]["stemmer"]
    for several, key in (([[row[0]] for row in references], "vs_summary1"), (references, "best_of_3_by_fmeasure")):
        found = metric(kind).score(outputs, several)
        for part, value in (
            ("precision", found.parts["precision"]),
            ("recall", found.parts["recall"]),
            ("fmeasure", found.value),
        ):
            assert value == pytest.approx(expected[key][kind][part], abs=5.1e-7)
    ends = expected["bootstrap_vs_summary1_npseed0"][kind]
    ours = metric(kind).score(outputs, [[row[0]] for row in references]).interval()
    assert (ours.low, ours.high) == pytest.approx([ends[end]["fmeasure"] for end in ("low", "high")], abs=0.004)


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_by_hand(gold: dict, kind: str) -> None:
    for pair in gold["rouge_hand"]:
        found = metric(kind).score([pair["prediction"]], [[pair["reference"]]])
        if kind == "rougeLsum" and "\n" not in pair["reference"] + pair["prediction"]:
            continue  # the gold splits at newlines alone
        expected = pair["expected"]["stemmer"][kind]
        assert [found.value, *found.parts.values()] == pytest.approx(
            [expected["fmeasure"], expected["precision"], expected["recall"]], abs=5.1e-7
        )


@pytest.mark.parametrize(
    ("name", "key"), [("bleu", "bleu_13a"), ("bleu_lc", "bleu_13a_lc"), ("chrf", "chrf"), ("chrf++", "chrf++")]
)
def test_bleu_and_chrf_are_sacrebleus(gold: dict, name: str, key: str) -> None:
    predictions, references = [pair["hyp"] for pair in gold["pairs"]], [pair["refs"] for pair in gold["pairs"]]
    expected = gold["sacrebleu"][key]
    found = metric(name).score(predictions, references)
    assert found.value * 100 == pytest.approx(expected["score"], abs=5.1e-7)
    first = metric(name).score(predictions, [row[:1] for row in references])
    assert first.value * 100 == pytest.approx(expected["score_first_ref_only"], abs=5.1e-7)
    for part in set(expected["signature"].split("|")) - {"nrefs:2", "version:2.6.0"}:
        assert part in found.signature
    each = {"bleu": "sentence_bleu_13a_effective_order", "chrf": "sentence_chrf", "chrf++": "sentence_chrf++"}.get(name)
    if each:
        assert (found.values * 100).tolist() == pytest.approx(gold["sacrebleu"][each], abs=5.1e-7)
    if name == "bleu":
        assert found.rows.sum(axis=0).tolist() == [
            *expected["counts"], *expected["totals"], expected["sys_len"], expected["ref_len"]
        ]  # fmt: skip
        precisions = [found.parts[f"precision_{size}"] * 100 for size in (1, 2, 3, 4)]
        assert precisions == pytest.approx(expected["precisions"], abs=5.1e-7)
        assert found.parts["brevity_penalty"] == expected["bp"]


def inputs(e2e: dict) -> tuple[list[str], list[list[str]]]:
    return [one["sys"] for one in e2e["inputs"]], [one["refs"] for one in e2e["inputs"]]


def test_nist_and_lower_cased_bleu_are_the_perl_scripts(e2e: dict) -> None:
    """7.8212 and 0.7203; the Python port's 7.7889 differs in the brevity penalty."""
    perl = e2e["expected"]["mteval_v13a_perl"]
    assert round(metric("nist").score(*inputs(e2e)).value, 4) == perl["NIST"]
    assert round(metric("bleu_lc").score(*inputs(e2e)).value, 4) == perl["BLEU"]


@pytest.mark.parametrize(("name", "key"), [("meteor", "METEOR"), ("rougeL_caption", "ROUGE_L"), ("cider", "CIDEr")])
def test_caption_metrics_are_the_challenges(e2e: dict, name: str, key: str) -> None:
    found = usable(name).score(*inputs(e2e))
    assert found.value == pytest.approx(e2e["expected"][key], abs=5.1e-7)
    assert found.values.tolist() == pytest.approx([one["expected"][key] for one in e2e["inputs"]], abs=5.1e-7)


def test_the_tokenizer_is_stanfords(e2e: dict) -> None:
    usable("cider")
    assert list(ptb(tuple(line["text"] for line in e2e["ptb_tokenizer"]))) == [
        line["expected"] for line in e2e["ptb_tokenizer"]
    ]
    for one in e2e["inputs"]:
        assert list(ptb((one["sys"], *one["refs"]))) == [one["ptb_sys"], *one["ptb_refs"]]


def test_exact_match_is_tk_instructs(gold: dict) -> None:
    found = metric("exact_match").score(gold["tk_instruct"]["predictions"], gold["tk_instruct"]["references"])
    assert found.value * 100 == pytest.approx(gold["tk_instruct"]["expected"]["exact_match"])
    assert found.values.tolist() == [one["exact_match"] for one in gold["tk_instruct"]["per_example"]]


def test_accuracy_is_the_reference_implementations(gold: dict) -> None:
    for one in gold["accuracy"]:
        found = accuracy(one["predictions"], [[target] for target in one["targets"]], strip=False)
        assert found.value * 100 == pytest.approx(one["expected_percent"], abs=5.1e-7)


def test_people_agree_on_dialogsum_as_the_metric_itself_says(dialogsum: tuple) -> None:
    """Each summary against the other two: the mean over the three, by hand."""
    _, references = dialogsum
    rouge = metric("rouge1").score
    by_hand = {"best": [], "mean": []}
    for one in range(3):
        answers, others = [row[one] for row in references], [row[:one] + row[one + 1 :] for row in references]
        by_hand["best"].append(rouge(answers, others).value)
        by_hand["mean"] += [rouge(answers, [[row[other]] for row in others]).value for other in (0, 1)]
    for several, values in by_hand.items():
        found = human_score("rouge1", references, several)  # type: ignore[arg-type]
        assert found is not None
        assert found.value == pytest.approx(sum(values) / len(values))
        assert len(found.values) == 40
        assert found.signature.endswith(f"|human:leave-one-out|others:{several}")
