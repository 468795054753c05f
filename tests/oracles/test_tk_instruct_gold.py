"""Super-NaturalInstructions prompts equal Tk-Instruct's own collator at every length limit."""

import json
import re
from pathlib import Path

import pytest
from tests import tiny
from transformers import AutoTokenizer

from luthier.data.formats.superni import TkInstruct, build_source
from luthier.data.load import load_examples
from luthier.data.source import Source
from luthier.data.task import Task
from luthier.encoding.encoder import Encoder, PromptTokens
from luthier.errors import UserError


def test_every_source_equals_the_collators(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "t5-tokenizer")

    def head(text: str, limit: int) -> str:
        ids = tokenizer(text).input_ids[:limit]
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    cases = [json.loads(line) for line in (shared / "gold" / "tk_instruct.jsonl").read_text().split("\n") if line]
    assert len(cases) == 198
    for case in cases:
        asked = case["encoding_args"]
        form = TkInstruct(
            name=asked["add_task_name"],
            definition=asked["add_task_definition"],
            positives=asked["num_pos_examples"],
            negatives=asked["num_neg_examples"],
            explanations=asked["add_explanation"],
        )
        count = lambda text: len(tokenizer(text).input_ids)  # noqa: E731
        found = build_source(case["instance"], form, case["max_source_length"], count, head)
        note = f"{case['task']} {case['instance_index']} {case['encoding']} {case['max_source_length']}"
        assert (found.positives, found.negatives, found.truncated) == (
            case["n_pos_kept"], case["n_neg_kept"], case["truncated"],
        ), note  # fmt: skip
        assert found.text == case.get("expected_source_no_cleanup", case["expected_source"]), note


def test_a_recipes_key_gives_the_collators_source(shared: Path, tmp_path: Path) -> None:
    """`template: tk-instruct:...` on a task file, read, rendered and counted as any task of a recipe."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "t5-tokenizer")
    encoder = Encoder(tokenizer, encoder_decoder=True, chat=False, max_length=2048)
    cases = [json.loads(line) for line in (shared / "gold" / "tk_instruct.jsonl").read_text().split("\n") if line]
    checked = set()
    for case in cases:
        asked = case["encoding_args"]
        parts = ["name"] if asked["add_task_name"] else []
        parts += ["def"] if asked["add_task_definition"] else []
        parts += [f"pos{asked['num_pos_examples']}"] if asked["num_pos_examples"] else []
        parts += [f"neg{asked['num_neg_examples']}"] if asked["num_neg_examples"] else []
        parts += ["expl"] if asked["add_explanation"] else []
        instance = case["instance"]
        own = {"input": instance["Instance"]["input"], "output": ["some", "other"]}
        file = tmp_path / f"{instance['Task'] or 'task'}.json"
        file.write_text(json.dumps({**instance, "Instances": [own]}))
        task = Task(
            template=f"tk-instruct:{'+'.join(parts)}@{case['max_source_length']}",
            train=Source(str(file)), validation=0, test=0,
        )  # fmt: skip
        (found,) = load_examples(task, tmp_path, 0, counter=lambda: PromptTokens(encoder)).train
        expected = case.get("expected_source_no_cleanup", case["expected_source"])
        assert (found.prompt, found.completion) == (expected, "some"), (case["task"], task.template)
        checked.add(task.template)
    assert len(checked) == 13


def test_a_wrong_form_is_explained(tmp_path: Path) -> None:
    for spec, message in [
        ("tk-instruct:deff", "unknown part 'deff'. Did you mean 'def'"),
        ("tk-instruct:def@9", "the limit '9' must be a number of tokens"),
    ]:
        task = Task(template=spec, train=Source("x.json"))
        with pytest.raises(UserError, match=re.escape(message)):
            load_examples(task, tmp_path, 0)
    (tmp_path / "x.jsonl").write_text('{"input": "a", "output": "b"}\n')
    task = Task(template="tk-instruct:def", train=Source("x.jsonl"), validation=0, test=0)
    with pytest.raises(UserError, match=r"x.jsonl:1: no column 'definition', which tk-instruct prompts are made of"):
        load_examples(task, tmp_path, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"Definition": 5}, "`definition` must be a text or a list of texts; it is 5"),
        ({"Definition": "d", "Positive Examples": ["a"]}, "`positive_examples` must be a list of objects"),
        ({"Definition": "d", "Positive Examples": [{"input": "a", "output": 1}]}, "`positive_examples` must be"),
    ],
)
def test_a_row_of_another_shape_is_named(tmp_path: Path, given: dict, message: str) -> None:
    (tmp_path / "t.json").write_text(json.dumps({**given, "Instances": [{"input": "i", "output": "o"}]}))
    task = Task(template="tk-instruct:def+pos1", train=Source("t.json"), validation=0, test=0)
    with pytest.raises(UserError, match=f"t.json:1: {message}"):
        load_examples(task, tmp_path, 0)


@pytest.mark.parametrize(
    ("asked", "references"),
    [([], (" one\n", "two")), (["outputs"], (" one\n", "two")), (["output"], (" one\n",))],
)
def test_an_output_is_stripped_and_outputs_are_references(
    tmp_path: Path, asked: list[str], references: tuple[str, ...]
) -> None:
    instances = [{"input": "i", "output": [" one\n", "two"]}]
    (tmp_path / "t.json").write_text(json.dumps({"Definition": "d", "Instances": instances}))
    task = Task(template="tk-instruct:def", test=Source("t.json"), validation=0, references=asked)
    (found,) = load_examples(task, tmp_path, 0).test
    assert found.completion == "one"
    assert found.references == references


def test_a_head_ends_in_a_whole_sign() -> None:
    tokenizer = tiny.byte_bpe()
    tokens = PromptTokens(Encoder(tokenizer, encoder_decoder=False, chat=False, max_length=64))
    for text in ("a 語語語語", "a \ufffd 語\ufffd"):
        heads = [tokens.head(text, limit) for limit in range(1, tokens.count(text) + 1)]
        assert all(text.startswith(head) for head in heads)
        assert heads[-1] == text
