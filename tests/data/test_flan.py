"""FLAN pairs as a task's templates, from a file without Python."""

from pathlib import Path

import pytest
import yaml

from luthier.data.formats.flan import find_templates
from luthier.data.load import load_examples
from luthier.data.source import Source
from luthier.data.task import Task
from luthier.errors import UserError

PAIRS = {"nli": [["{premise}\n\n{options_}", "{answer}"], {"inputs": "So: {premise}?", "targets": "{answer}"}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(PAIRS))
    lines = [f'{{"premise": "p{n} {{x}}", "answer": "yes", "options": ["yes", "no"]}}' for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path


def load(folder: Path, **given: object):
    kept = {"template": "flan:pairs.yaml/nli", "train": Source("rows.jsonl"), "validation": 0, "test": 0}
    return load_examples(Task(**(kept | given)), folder, 0).train  # type: ignore[arg-type]


def test_every_pair_of_a_task_is_a_template(folder: Path) -> None:
    found = load(folder, template_choice="all")
    assert [one.prompt for one in found[:2]] == ["p0 {x}\n\nOPTIONS:\n- yes\n- no", "So: p0 {x}?"]
    assert {(one.completion, one.choices) for one in found} == {("yes", ("yes", "no"))}
    assert len(found) == 16
    assert len({one.prompt[:3] for one in load(folder)}) > 1


def test_options_may_be_the_tasks(folder: Path) -> None:
    assert load(folder, choices=["yes", "maybe"], template_choice="all")[0].prompt.endswith("- yes\n- maybe")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("flan:pairs.yaml/nlu", "no pairs for a task 'nlu'. Did you mean 'nli'"),
        ("flan:pairs", "Write flan:FILE.yaml/TASK"),
        ("flan:other.yaml/nli", "could not be read"),
    ],
)
def test_mistakes_are_explained(folder: Path, template: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load(folder, template=template)
    assert message in str(error.value)


def test_a_place_that_no_column_fills_is_named(folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"premises": "p", "answer": "yes"}\n')
    with pytest.raises(UserError, match="rows.jsonl:1: the pair uses {options_}|no column 'premise'.*'premises'"):
        load(folder, template_choice="all")


def test_fields_are_made_from_raw_rows(folder: Path) -> None:
    fields = {
        "replace": {"text": [["<.*>", " "]]},
        "labels": {"answer": {"label": ["no", "yes"]}},
        "add": {"options": ["no", "yes"]},
    }
    pairs = [["{text}? {options_}", "{answer}"]]
    (folder / "pairs.yaml").write_text(yaml.safe_dump({"raw": {"fields": fields, "pairs": pairs}}))
    (folder / "rows.jsonl").write_text('{"text": "a<b>c", "label": 1}\n')
    found = load(folder, template="flan:pairs.yaml/raw")
    assert (found[0].prompt, found[0].completion) == ("a c? OPTIONS:\n- no\n- yes", "yes")
    assert found[0].choices == ("no", "yes")
    [template] = find_templates(folder / "pairs.yaml", "raw", None)
    assert template.render_prompt({"text": "a<b>c"}, "text 1") == found[0].prompt
    (folder / "rows.jsonl").write_text('{"text": "a", "label": 2}\n')
    with pytest.raises(UserError, match="rows.jsonl:1: label is 2; `fields` has labels for 0 to 1"):
        load(folder, template="flan:pairs.yaml/raw")
    fields["rewrite"] = {}
    (folder / "pairs.yaml").write_text(yaml.safe_dump({"raw": {"fields": fields, "pairs": pairs}}))
    with pytest.raises(UserError, match="raw: `fields` has replace, labels and add"):
        load(folder, template="flan:pairs.yaml/raw")
