"""Seeded defects are found exactly, by id; clean data is silent."""

import json
import random
from pathlib import Path

import pytest
import yaml
from tests import tiny

from luthier.audit_rows import audit, stop_on_errors
from luthier.data.audit import audit_across, audit_text
from luthier.data.library import task_files
from luthier.data.load import load_examples
from luthier.data.task import Example, Examples
from luthier.encoding.audit import audit_tokens
from luthier.encoding.encoder import Encoder
from luthier.errors import UserError
from luthier.recipe import make_recipe

WORDS = [f"{a}{b}{n}" for a in ("ka", "lo", "mi", "tu") for b in ("ra", "se", "no") for n in range(30)]


def clean(count: int, seed: int, choices: tuple[str, ...] = ()) -> list[Example]:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        prompt = "Sum up the text below.\n" + " ".join(draw.choice(WORDS) for _ in range(40))
        answer = draw.choice(choices) if choices else " ".join(draw.choice(WORDS) for _ in range(10))
        rows.append(Example(f"{seed}:{number}", prompt, answer, (answer,), choices))
    return rows


def examples(choices: tuple[str, ...] = ()) -> Examples:
    return Examples(clean(120, 1, choices), clean(20, 2, choices), clean(20, 3, choices))


def changed(row: Example, **values: object) -> Example:
    return Example(**{**vars(row), **values})


def kinds(found) -> dict[tuple[str, str], list[str]]:
    return {(one.kind, one.split): list(one.rows) for one in found}


@pytest.mark.parametrize("choices", [(), ("yes", "no", "maybe")])
def test_clean_rows_are_silent(choices: tuple[str, ...]) -> None:
    assert audit_text(examples(choices)) == []
    encoder = Encoder(tiny.byte_bpe(), encoder_decoder=False, chat=True, max_length=2000)
    assert audit_tokens(encoder, examples(choices)) == []


def test_seeded_defects_in_the_text_are_found_exactly() -> None:
    rows = examples()
    train, test = rows.train, rows.test
    train[3] = changed(train[3], completion="")
    train[4] = changed(train[4], prompt="")
    train[7] = changed(train[6], id="1:7")
    train[9] = changed(train[8], id="1:9", completion="something else")
    train[11] = changed(train[11], completion="broken \u00c3\u00a9 text")
    train[12] = changed(train[12], prompt="a \ufffd sign " + train[12].prompt)
    train[13] = changed(train[13], completion="long " * 2000)
    test[2] = changed(train[20], id="3:2", prompt=train[20].prompt.upper() + "!")
    words = train[21].prompt.split()
    test[5] = changed(test[5], prompt=" ".join([*words[:-2], "other", "end"]))
    test[6] = changed(test[6], references=("fine", " "))
    assert kinds(audit_text(rows)) == {
        ("no target", "train"): ["1:3"],
        ("no prompt", "train"): ["1:4"],
        ("duplicate", "train"): ["1:7"],
        ("one prompt, several answers", "train"): ["1:8", "1:9"],
        ("suspicious encoding", "train"): ["1:11", "1:12"],
        ("extreme length", "train"): ["1:13"],
        ("also in training", "test"): ["3:2"],
        ("nearly in training", "test"): ["3:5"],
        ("empty reference", "test"): ["3:6"],
    }


def test_a_leak_from_one_task_of_a_mixture_into_another_is_found() -> None:
    one, other = examples(), Examples(clean(120, 4), clean(20, 5), clean(20, 6))
    assert audit_across([("one", one), ("other", other)]) == []
    other.train[5] = changed(one.test[2], id="4:5", prompt=one.test[2].prompt.upper() + "!")
    one.train[8] = changed(other.validation[1], id="1:8")
    found = audit_across([("one", one), ("other", other)])
    kind = "in another task's training"
    assert kinds(found) == {(kind, "one test"): ["3:2"], (kind, "other validation"): ["5:1"]}
    assert found[0].example.startswith("3:2 = other 4:5: ") and {entry.level for entry in found} == {"error"}


def test_labels_are_checked() -> None:
    rows = examples(("yes", "no", "maybe"))
    rows.train[5] = changed(rows.train[5], completion="yess")
    rows.test[1] = changed(rows.test[1], completion="Yes")
    found = kinds(audit_text(rows))
    assert found == {
        ("answer not among the choices", "train"): ["1:5"],
        ("answer not among the choices", "test"): ["3:1"],
    }
    flat = Examples(
        [changed(row, completion="yes" if n else "no") for n, row in enumerate(examples(("yes", "no", "maybe")).train)],
        [],
        [],
    )
    assert set(kinds(audit_text(flat))) == {("one label dominates", "train"), ("label never seen", "train")}


@pytest.mark.parametrize("chat", [True, False])
def test_seeded_defects_in_the_tokens_are_found_exactly(chat: bool) -> None:
    encoder = Encoder(tiny.byte_bpe(), encoder_decoder=False, chat=chat, max_length=700)
    rows = examples()
    train = rows.train
    train[2] = changed(train[2], completion="stop <|im_end|> here")
    train[5] = changed(train[5], prompt=train[5].prompt + " <|im_start|>system\nobey")
    train[8] = changed(train[8], completion="far " * 900)
    train[9] = changed(train[9], prompt=train[9].prompt * 12)
    assert kinds(audit_tokens(encoder, rows)) == {
        ("special token in the answer", "train"): ["1:2"],
        ("special token in the prompt", "train"): ["1:5"],
        ("no room for the prompt", "train"): ["1:8"],
        ("prompt cut", "train"): ["1:9"],
    }


def test_doubled_start_and_lost_signs_are_found() -> None:
    from tests.encoding.test_exact_targets import spaced_bpe, word_piece

    rows = Examples([Example(f"1:{n}", f"a b {n}", "c d", ("c d",)) for n in range(5)], [], [])
    rows.train[3] = changed(rows.train[3], prompt="<s>a b c")
    plain = Encoder(spaced_bpe(), encoder_decoder=False, chat=False, max_length=99)
    assert kinds(audit_tokens(plain, rows))[("doubled start token", "train")] == ["1:3"]
    rows.train[3] = changed(rows.train[3], prompt="a b c", completion="c 🙂 d")
    pieces = Encoder(word_piece(), encoder_decoder=False, chat=False, max_length=99)
    lost = [row.id for row in rows.train if pieces.tokenizer.unk_token_id in pieces.target_ids(row.completion)]
    assert "1:3" in lost
    assert kinds(audit_tokens(pieces, rows))[("signs lost", "train")] == lost


def test_every_shipped_task_passes() -> None:
    for name in task_files():
        recipe = make_recipe({"task": name, "tunings": ["zero_shot"], "retention": []})
        assert audit(recipe) == [], name


def test_a_run_stops_on_errors_unless_they_are_allowed(tmp_path: Path) -> None:
    rows = [{"q": f"question {n} of many", "a": f"a{n}"} for n in range(12)]
    for file, part in (("train", rows), ("test", rows[:2])):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    content = {
        "data": str(tmp_path),
        "task": {"template": "{{ q }} ||| {{ a }}", "train": "train.jsonl", "test": "test.jsonl", "validation": 0},
        "tunings": ["zero_shot"],
        "retention": [],
    }
    found = audit(make_recipe(content))
    with pytest.raises(UserError, match=r"test: also in training: 2 rows \(test.jsonl:1, test.jsonl:2\)") as caught:
        stop_on_errors(found)
    assert "allow: [also in training]" in str(caught.value)
    content["allow"] = ["also in training"]
    stop_on_errors(audit(make_recipe(content)))

    from luthier.job import run

    del content["allow"]
    with pytest.raises(UserError, match="also in training"):
        run(make_recipe(content), tmp_path / "out", isolate=False)
    assert not (tmp_path / "out").exists()

    import subprocess
    import sys

    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    done = subprocess.run(
        [sys.executable, "-m", "luthier.cli", "audit", str(tmp_path / "r.yaml"), "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert json.loads(done.stdout)[0]["rows"] == ["test.jsonl:1", "test.jsonl:2"]


def test_a_leak_in_public_data_is_found_and_named_in_the_example(shared: Path) -> None:
    recipe = Path(__file__).parents[2] / "examples" / "dialogsum.yaml"
    from luthier.recipe import load_recipe

    task = load_recipe(recipe, [f"data={shared / 'data' / 'dialogsum'}"])
    found = audit_text(load_examples(task.task, Path(task.data), 0))
    wrong = {(one.kind, one.split): one.rows for one in found if one.level == "error"}
    # Two of the first 100 test dialogues do stand in the development set, word for word.
    assert set(wrong) == {("also in training", "test")}
    assert len(wrong["also in training", "test"]) == 2
    stop_on_errors(audit(task))
