"""FLAN pairs equal the output of FLAN's own preprocessors."""

import ast
import json
from pathlib import Path

import pytest

from luthier.data.formats.flan import (
    Fields,
    FlanTemplate,
    Pattern,
    few_shot,
    keep_exemplars,
    natural_instructions,
    zero_shot,
)
from luthier.data.forms import framed
from luthier.data.task import Example
from luthier.data.templates import NamedTemplate


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


def test_any_number_of_shots(cases: list[dict]) -> None:
    for case in kinds(cases, "x_shot"):
        pattern = Pattern(**case["pattern"])
        shown = [(pattern, one) for one in literal(case["exemplar_fields"])]
        pair = few_shot((pattern, case["query_fields"]), shown, folded=True)
        assert (pair.inputs, pair.targets) == (case["expected_inputs"], case["expected_targets"]), case


def test_a_mixtures_few_shot_form(cases: list[dict]) -> None:
    """The same through a task's rendered rows, as a recipe has it: rows are framed after they were rendered."""
    for case in kinds(cases, "x_shot"):
        template = NamedTemplate("flan", FlanTemplate(Pattern(**case["pattern"])), outside=False)

        def row(values: dict, template: NamedTemplate = template) -> Example:
            prompt, completion = template.template.parts(values, "row")
            return Example("row", prompt, completion, frame=template.frame(values, "row"))

        found = framed(row(case["query_fields"]), [row(one) for one in literal(case["exemplar_fields"])])
        assert (found.prompt, found.completion) == (case["expected_inputs"], case["expected_targets"]), case


def test_natural_instructions(cases: list[dict]) -> None:
    for case in kinds(cases, "natinst_x_shot"):
        values = case["fields"]
        shown = [(values[f"exemplar_inputs_{n}"], values[f"exemplar_targets_{n}"]) for n in range(2)]
        pair = natural_instructions(Pattern(**case["pattern"]), values, shown)
        assert (pair.inputs, pair.targets) == (case["expected_inputs"], case["expected_targets"]), case


def test_exemplars_that_do_not_fit_are_dropped(cases: list[dict]) -> None:
    for case in kinds(cases, "prune_by_length"):
        sizes = list(zip(case["exemplar_input_tokens"], case["exemplar_target_tokens"], strict=True))
        kept = keep_exemplars(sizes, case["query_input_tokens"], case["max_input_length"])
        assert kept == case["expected_kept"], case
        assert (not kept) == case["example_dropped_if_none_kept"], case


SAMSUM = Fields(replace={"dialogue": [["\r\n", "\n"], ["<.*>", " "]]})
RTE = Fields(
    labels={"answer": {"label": ["yes", "no"]}, "glm_answer": {"label": ["true", "false"]}},
    add={"options": ["yes", "no"], "glm_options": ["true", "false"]},
)


def test_fields_of_raw_rows(cases: list[dict]) -> None:
    for case in kinds(cases, "fields"):
        made = {"samsum": SAMSUM, "rte": RTE}[case["task"]]
        template = FlanTemplate(Pattern("{options_}", ""), fields=made)
        found = made.of(case["raw_row"], "row")
        if "options_" in case["expected_fields"]:
            found["options_"] = template.parts(case["raw_row"], "row")[0]
        assert {key: found[key] for key in case["expected_fields"]} == case["expected_fields"], case
