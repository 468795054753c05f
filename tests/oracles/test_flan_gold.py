"""FLAN pairs equal the output of FLAN's own preprocessors."""

import ast
import json
from pathlib import Path

import pytest

from luthier.data.formats.flan import Pattern, few_shot, zero_shot


@pytest.fixture(scope="module")
def cases(shared: Path) -> list[dict]:
    return [json.loads(line) for line in (shared / "gold" / "flan_templates.jsonl").read_text().split("\n") if line]


def literal(value):
    return ast.literal_eval(value) if isinstance(value, str) else value


def kinds(cases: list[dict], *wanted: str) -> list[dict]:
    found = [case for case in cases if case["kind"] in wanted]
    assert found
    return found


def test_pairs_alone(cases: list[dict]) -> None:
    for case in kinds(cases, "zero_shot", "natinst"):
        pattern = Pattern(case["inputs_pattern"], case["targets_pattern"])
        pair = zero_shot(pattern, case["fields"])
        assert (pair.inputs, pair.targets) == (case["expected_inputs"], case["expected_targets"]), case


def test_fixed_shots(cases: list[dict]) -> None:
    for case in kinds(cases, "fixed_5_shot", "fixed_2_shot", "fixed_1_shot"):
        pattern = Pattern(**case["pattern"])
        pair = few_shot((pattern, case["query_fields"]), [(pattern, one) for one in literal(case["exemplar_fields"])])
        assert (pair.inputs, pair.targets) == (case["expected_inputs"], case["expected_targets"]), case


def test_mixed_templates(cases: list[dict]) -> None:
    for case in kinds(cases, "template_mix_5_shot"):
        patterns = {int(key): Pattern(**value) for key, value in literal(case["patterns"]).items()}
        shown = zip(case["exemplar_template_indices"], literal(case["exemplar_fields"]), strict=True)
        pair = few_shot(
            (patterns[case["query_template_index"]], case["query_fields"]),
            [(patterns[index], one) for index, one in shown],
            case["example_separator"],
        )
        assert (pair.inputs, pair.targets) == (case["expected_inputs"], case["expected_targets"]), case
