"""FLAN pairs as a task's templates, from a file without Python."""

import re
from pathlib import Path

import pytest
import yaml

from luthier.data.formats.flan_file import find_templates
from luthier.data.forms import in_form
from luthier.data.load import load_examples
from luthier.data.mixture import Entry
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


SETS = {
    "nli": {
        "pairs": [["{premise}\n\n{options_}", "{answer}"]],
        "no_options": [["{premise}?", "{answer}"]],
        "few_shot": [
            {"inputs": "{premise} {options_}", "targets": "{answer}", "inputs_prefix": "Q: ", "targets_prefix": "A: ",
             "x_y_delimiter": "\n", "example_separator": "\n--\n"}
        ],
    },
    "plain": [["{premise}", "{answer}"]],
}  # fmt: skip


def shown(folder: Path, form: str, task: str = "nli", budget: int = 10**6):
    (folder / "sets.yaml").write_text(yaml.safe_dump(SETS))
    given = Task(template=f"flan:sets.yaml/{task}", train=Source("rows.jsonl"), validation=0, test=0)
    load_task = lambda one: load_examples(one, folder, 0)  # noqa: E731
    return in_form(
        Entry(given, form, 2, 1.0), load_task(given).train, load_task, 0, budget, lambda one: len(one.prompt)
    )  # type: ignore[arg-type]


def test_each_form_of_a_mixture_takes_its_own_pairs(folder: Path) -> None:
    assert shown(folder, "zero_shot_options")[0].prompt == "p0 {x}\n\nOPTIONS:\n- yes\n- no"
    assert shown(folder, "zero_shot")[0].prompt == "p0 {x}?"
    pattern = r"Q: (p\d) {x} OPTIONS:\n- yes\n- no\nA: yes\n--\nQ: (p\d) {x} OPTIONS:\n- yes\n- no\nA: yes\n--\nQ: p0 {x} OPTIONS:\n- yes\n- no\nA:"
    assert re.fullmatch(pattern, shown(folder, "few_shot_options")[0].prompt)
    # The next best where a file has no pairs for a form.
    alone = shown(folder, "few_shot", "plain")[0]
    assert re.fullmatch(r"p\d {x}\n\nyes\n\np\d {x}\n\nyes\n\np0 {x}\n\n", alone.prompt)
    assert (alone.completion, alone.shots) == ("yes", ())


def test_exemplars_that_do_not_fit_are_left_out_from_the_end(folder: Path) -> None:
    whole = shown(folder, "few_shot_options")[0].prompt
    one = shown(folder, "few_shot_options", budget=len(whole) - 1)[0].prompt
    assert one.count("--") == 1 and whole.startswith(one.partition("--")[0])
    assert shown(folder, "few_shot_options", budget=20)[0].prompt == "p0 {x} OPTIONS:\n- yes\n- no"


def test_a_wrong_file_of_sets_is_explained(folder: Path) -> None:
    for content, message in [
        ({"nli": {"pairs": [["a", "b"]], "fewshot": []}}, "unknown key 'fewshot'. Did you mean 'few_shot'"),
        ({"nli": {"few_shot": [["a", "b"]]}}, "nli has no pairs"),
        ({"nli": {"pairs": [["a", "b"]], "few_shot": "x"}}, "'few_shot' must be a list"),
    ]:
        (folder / "pairs.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(UserError, match=re.escape(message)):
            load(folder)
    (folder / "pairs.yaml").write_text(yaml.safe_dump(PAIRS))
    with pytest.raises(UserError, match="unknown set of pairs 'fewshot'"):
        load(folder, template="flan:pairs.yaml/nli@fewshot")
