"""Renderings equal promptsource's own, part for part, errors and seeded draws included."""

import json
from pathlib import Path

import pytest

from luthier.data.template import Template
from luthier.errors import UserError


def render(case: dict) -> tuple[Template, list[str]]:
    template = Template(case["jinja"], case["answer_choices"], strict=False)
    return template, template.parts(case["row"], "row", seed=case.get("seed"), truncate=case["truncate"])


@pytest.mark.parametrize(
    ("name", "lines"),
    [("promptsource_apply", 368), ("promptsource_synthetic", 88), ("promptsource_choice_seeded", 189)],
)
def test_every_rendering_equals_promptsources(shared: Path, name: str, lines: int) -> None:
    cases = [json.loads(line) for line in (shared / "gold" / f"{name}.jsonl").read_text().split("\n") if line]
    assert len(cases) == lines
    for case in cases:
        note = f"{case.get('file')} {case.get('template_name') or case.get('note')} {case['row']}"
        if "expected_error" in case:
            with pytest.raises(UserError) as caught:
                render(case)
            cause = caught.value.__cause__
            assert type(cause).__name__ == case["expected_error"] or case["expected_error"] in str(caught.value), note
            continue
        template, parts = render(case)
        assert parts == case["expected_parts"], note
        if "expected_answer_choices_list" not in case:
            continue
        choices = template.choices(case["row"], "row")
        assert (None if choices is None else list(choices)) == case["expected_answer_choices_list"], note
