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
    from luthier.recipe import load_recipe

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
