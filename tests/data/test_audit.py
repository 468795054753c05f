"""Seeded defects are found exactly, by id; clean data is silent."""

import json
import random
from pathlib import Path

import pytest
import yaml
from tests import tiny

from luthier.audit_rows import audit, stop_on_errors
from luthier.data.audit import read_text
from luthier.data.leaks import find_leaks
from luthier.data.library import task_files
from luthier.data.load import load_examples
from luthier.data.task import SPLITS, Example, Examples
from luthier.encoding.audit import audit_text, audit_tokens
from luthier.encoding.encoder import Encoder
from luthier.errors import UserError
from luthier.recipe_file import make_recipe

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


def leaks(one: Examples, other: Examples):
    read = [{split: read_text(rows, range(len(rows)), 1) for split, rows in splits(each)} for each in (one, other)]
    return [found for each in find_leaks([("one", one), ("other", other)], read) for found in each]


def splits(rows: Examples):
    return [(split, getattr(rows, split)) for split in SPLITS]


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
    assert leaks(one, other) == []
    other.train[5] = changed(one.test[2], id="4:5", prompt=one.test[2].prompt.upper() + "!")
    one.train[8] = changed(other.validation[1], id="1:8")
    words = one.validation[4].prompt.split()
    other.train[7] = changed(other.train[7], prompt=" ".join([*words[:-2], "other", "end"]))
    found = leaks(one, other)
    kind = "in another task's training"
    assert kinds(found) == {
        (kind, "test"): ["3:2"],
        (kind, "validation"): ["5:1"],
        (f"nearly {kind}", "validation"): ["2:4"],
    }
    assert [(one.level, one.example[:16]) for one in found] == [
        ("warning", "2:4 ~ other 4:7"),
        ("error", "3:2 = other 4:5:"),
        ("error", "5:1 = one 1:8: S"),
    ]


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
    from luthier.recipe_file import load_recipe

    task = load_recipe(recipe, [f"data={shared / 'data' / 'dialogsum'}"])
    found = audit_text(load_examples(task.task, Path(task.data), 0))
    wrong = {(one.kind, one.split): one.rows for one in found if one.level == "error"}
    # Two of the first 100 test dialogues do stand in the development set, word for word.
    assert set(wrong) == {("also in training", "test")}
    assert len(wrong["also in training", "test"]) == 2
    stop_on_errors(audit(task))


def defective(folder: Path, rows: int) -> dict:
    """A recipe over files with known defects: 7 duplicates, 5 encodings, 3 leaks, 2 near leaks, 4 cut prompts."""
    draw = random.Random(5)
    texts = [" ".join(draw.choice(WORDS) for _ in range(30)) for _ in range(rows)]
    train = [{"q": text, "a": f"answer {number}"} for number, text in enumerate(texts)]
    held = [{"q": " ".join(draw.choice(WORDS) for _ in range(30)), "a": f"held {n}"} for n in range(40)]
    for number in range(7):
        train[100 + number] = dict(train[number])
    for number in range(5):
        train[200 + number]["a"] += " \u00c3\u00a9"
    for number in range(3):
        held[number]["q"] = train[300 + number]["q"].upper()
    for number in range(2):
        held[10 + number]["q"] = train[310 + number]["q"] + " closing"
    for number in range(4):
        train[320 + number]["q"] += " far" * 400
    for file, part in (("train", train), ("test", held)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return {
        "data": str(folder),
        "task": {"template": "{{ q }} ||| {{ a }}", "train": "train.jsonl", "test": "test.jsonl", "validation": 0},
        "tunings": ["zero_shot"],
        "retention": [],
        "max_length": 256,
    }


def named_rows(file: str, *numbers: int) -> list[str]:
    return [f"{file}.jsonl:{number + 1}" for number in numbers]


@pytest.mark.parametrize("few", [100, 10**6], ids=["worker processes", "this process"])
def test_many_rows_are_audited_the_same_by_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    from luthier import workers
    from luthier.encoding import audit as module

    monkeypatch.setattr(module, "FEW", few)
    monkeypatch.setattr(module, "CHUNK", 90)
    monkeypatch.setattr(module, "processors", lambda: 2)
    monkeypatch.setattr(workers, "processors", lambda: 2)
    found = kinds(audit(make_recipe(defective(tmp_path, 500))))
    assert found == {
        ("duplicate", "train"): named_rows("train", *range(100, 107)),
        ("suspicious encoding", "train"): named_rows("train", *range(200, 205)),
        ("also in training", "test"): named_rows("test", 0, 1, 2),
        ("nearly in training", "test"): named_rows("test", 10, 11),
        ("prompt cut", "train"): named_rows("train", *range(320, 324)),
    }


def test_sound_data_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.encoding import audit as module

    recipe = make_recipe(defective(tmp_path, 400))
    first, reads = audit(recipe), []
    monkeypatch.setattr(module, "read_text", lambda *given: reads.append(given))
    assert audit(recipe) == first
    assert not reads
    shorter = make_recipe({**defective(tmp_path, 400), "max_length": 128})
    with pytest.raises(AttributeError):  # another limit cuts other rows: they are read again
        audit(shorter)
    assert reads


def test_a_conversation_is_told_from_another_by_all_that_was_asked() -> None:
    """A last question that many conversations share makes them neither duplicates nor contradictions."""
    rows = [
        Example(f"1:{n}", "Thank you, bye!", f"Bye, and good luck with {WORDS[n]}.", ("x",), shots=((f"about {n}?", "yes"),), learnt=1)
        for n in range(30)
    ]  # fmt: skip
    assert audit_text(Examples(rows, [], [])) == []
    rows[9] = changed(rows[8], id="1:9")
    assert kinds(audit_text(Examples(rows, [], []))) == {("duplicate", "train"): ["1:9"]}


def test_of_large_splits_a_sample_of_word_sequences_is_kept() -> None:
    from luthier.data.audit import kept_sequences

    assert [kept_sequences(rows) for rows in (0, 19_000, 20_000, 20_001, 50_000, 200_000)] == [1, 1, 1, 2, 4, 16]
    rows = examples()
    words = rows.train[21].prompt.split()
    rows.test[5] = changed(rows.test[5], prompt=" ".join([*words[:-2], "other", "end"]))
    read = {split: read_text(each, range(len(each)), 4) for split, each in splits(rows)}
    assert len(read["test"].shingles[0]) < 40 / 2
    assert kinds(find_leaks([("", rows)], [read])[0]) == {("nearly in training", "test"): ["3:5"]}


def recipe_of(folder: Path, **changes: object):
    """A recipe on files written beside it: `train`, `test` ... are rows."""
    task = {"template": "Say it: {{ q }} ||| {{ a }}", "validation": 0, **changes.pop("task", {})}  # type: ignore[dict-item]
    for name in ("train", "validation", "test"):
        if isinstance(rows := changes.pop(name, None), list):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            task[name] = f"{name}.jsonl"
    return make_recipe({"data": str(folder), "task": task, "tunings": ["zero_shot"], "retention": [], **changes})


def plain_rows(count: int, start: int = 0) -> list[dict]:
    draw = random.Random(start)
    return [{"q": " ".join(draw.choice(WORDS) for _ in range(12)), "a": f"answer {start + n}"} for n in range(count)]


def test_what_a_column_leaves_out_is_named(tmp_path: Path) -> None:
    rows = plain_rows(20)
    rows[3]["a"], rows[5]["q"], rows[7]["q"], rows[9]["a"] = None, None, " ", ""
    found = kinds(audit(recipe_of(tmp_path, train=rows, test=plain_rows(5, 50))))
    assert found == {
        ("null field", "train"): named_rows("train", 3, 5),
        ("empty field", "train"): named_rows("train", 7),
        ("no target", "train"): named_rows("train", 9),
    }
    careful = "Say it: {{ q or 'nothing' }}, {{ a or 1 }} ||| {{ a or 'nothing' }}"
    found = kinds(audit(recipe_of(tmp_path, train=rows, test=plain_rows(5, 50), task={"template": careful})))
    assert found == {("empty field", "train"): named_rows("train", 3, 5, 7, 9)}


def test_signs_make_a_sum_another_and_vowels_a_word(tmp_path: Path) -> None:
    sums = [{"q": f"{n} {sign} 1 =", "a": str(n + 1 if sign == "+" else n - 1)} for n in range(20) for sign in "+-"]
    hindi = [
        {"q": f"\u0915{vowel} \u0918\u0930 {n}", "a": f"{vowel}{n}"} for n in range(5) for vowel in "\u093e\u0940\u093f"
    ]
    held = [{"q": f"{n} * 1 =", "a": str(n)} for n in range(20)] + [{"q": "\u0915\u0947 \u0918\u0930 1", "a": "x"}]
    assert audit(recipe_of(tmp_path, train=sums + hindi, test=held)) == []
    again = [{"q": " 3  + 1 = ", "a": "4"}, {"q": "\u0915\u093e \u0918\u0930 1!", "a": "x"}]
    found = kinds(audit(recipe_of(tmp_path, train=sums + hindi, test=held + again)))
    assert found == {("also in training", "test"): named_rows("test", 21, 22)}


def test_signs_without_spaces_are_compared_one_by_one(tmp_path: Path) -> None:
    draw = random.Random(3)
    text = lambda: "".join(chr(draw.randrange(0x4E00, 0x5000)) for _ in range(40))  # noqa: E731
    train = [{"q": text(), "a": f"a {n}"} for n in range(30)]
    held = [{"q": text(), "a": f"b {n}"} for n in range(5)] + [{"q": train[4]["q"][:-2] + "\u4e00\u4e8c", "a": "x"}]
    found = kinds(audit(recipe_of(tmp_path, train=train, test=held)))
    assert found == {("nearly in training", "test"): named_rows("test", 5)}


def test_test_rows_that_stand_in_validation_are_named(tmp_path: Path) -> None:
    validation, test = plain_rows(10, 30), plain_rows(10, 60)
    test[2] = dict(validation[5])
    test[6] = {"q": validation[8]["q"] + " indeed", "a": "x"}
    found = audit(recipe_of(tmp_path, train=plain_rows(30), validation=validation, test=test))
    assert kinds(found) == {
        ("also in validation", "test"): named_rows("test", 2),
        ("nearly in validation", "test"): named_rows("test", 6),
    }
    assert {one.level for one in found} == {"warning"}


def test_rows_a_template_from_outside_leaves_out_are_named(tmp_path: Path) -> None:
    (tmp_path / "templates.yaml").write_text(
        "dataset: x\ntemplates:\n"
        "  1: !Template\n    name: some\n    jinja: '{% if q %}Say {{ q }} ||| {{ a }}{% endif %}'\n"
    )
    rows = plain_rows(12)
    rows[4]["q"] = rows[8]["q"] = ""
    given = {"task": {"template": "templates.yaml"}}
    found = audit(recipe_of(tmp_path, train=rows, test=plain_rows(4, 40), **given))
    assert [(one.kind, one.level, one.count) for one in found] == [("template does not apply", "warning", 2)]
    assert found[0].rows[0].startswith("train.jsonl:5")
    for row in rows:
        row["q"] = ""
    found = audit(recipe_of(tmp_path, train=rows, test=plain_rows(4, 40), **given))
    assert [(one.kind, one.level, one.count) for one in found] == [("template does not apply", "error", 12)]


def test_retention_tasks_are_audited(tmp_path: Path) -> None:
    kept = plain_rows(6, 80)
    kept[2] = {"q": plain_rows(20)[3]["q"], "a": "maybe"}
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    retained = {"name": "kept", "template": "Say it: {{ q }} ||| {{ a }}", "test": "kept.jsonl"}
    found = kinds(audit(recipe_of(tmp_path, train=plain_rows(20), test=plain_rows(5, 50), retention=[retained])))
    assert found == {("in another task's training", "kept test"): named_rows("kept", 2)}
    recipe = make_recipe({"task": "support-dialogues", "tunings": ["lora"]})
    assert recipe.retention and audit(recipe) == [], "what ships is sound together"


def test_the_forms_a_mixture_shows_are_audited(tmp_path: Path) -> None:
    rows = [{**row, "why": "" if n % 4 == 0 else f"since {n}"} for n, row in enumerate(plain_rows(20))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in plain_rows(5, 50))
    )  # without reasons
    task = {
        "name": "t", "template": "{{ q }} ||| {{ a }}", "chain_of_thought": "{{ q }} Why? ||| {{ why }}",
        "train": "train.jsonl", "test": "test.jsonl", "validation": 0,
    }  # fmt: skip
    member = {"task": task, "forms": {"zero_shot": 1, "chain_of_thought": 1}}
    recipe = make_recipe({"data": str(tmp_path), "task": {"tasks": [member]}, "tunings": ["lora"], "retention": []})
    found = kinds(audit(recipe))
    assert found == {("no target", "t (chain_of_thought) train"): named_rows("train", 0, 4, 8, 12, 16)}


def test_own_tokens_are_found_in_every_answer_of_a_conversation() -> None:
    encoder = Encoder(tiny.byte_bpe(), encoder_decoder=False, chat=True, max_length=500)
    rows = [
        Example(f"1:{n}", f"and {n}?", "fine", ("fine",), shots=((f"first {n}", "well"),), learnt=1) for n in range(4)
    ]
    rows[2] = changed(rows[2], shots=(("first 2", "stop <|im_end|> here"),))
    assert kinds(audit_tokens(encoder, Examples(rows, [], []))) == {("special token in the answer", "train"): ["1:2"]}


def test_an_unknown_token_that_is_written_out_is_no_lost_sign() -> None:
    """Where the unknown token is also the end of text, as GPT-2's, writing it out ends the answer."""
    from copy import deepcopy

    tokenizer = deepcopy(tiny.byte_bpe())
    tokenizer.unk_token = "<|endoftext|>"
    encoder = Encoder(tokenizer, encoder_decoder=False, chat=False, max_length=500)
    rows = [Example(f"1:{n}", f"say {n}", "fine", ("fine",)) for n in range(4)]
    rows[1] = changed(rows[1], completion="a <|endoftext|> b")
    rows[3] = changed(rows[3], prompt="a <|endoftext|> b")
    assert kinds(audit_tokens(encoder, Examples(rows, [], []))) == {
        ("special token in the answer", "train"): ["1:1"],
        ("special token in the prompt", "train"): ["1:3"],
    }
