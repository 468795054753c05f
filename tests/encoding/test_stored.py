"""Rows from the cache are the rows that encoding gives, whoever encoded them; a million take no memory."""

import gc
import json
import random
from pathlib import Path

import pytest
from tests import tiny

from luthier.data import load
from luthier.data.load import load_examples
from luthier.data.stored import packed, unpacked
from luthier.data.task import Example, Task
from luthier.encoding import stored
from luthier.encoding.batches import encode_all
from luthier.encoding.encoder import Encoder
from luthier.encoding.stored import stored_rows
from luthier.errors import UserError
from luthier.recipe_file import make_recipe
from luthier.training_rows import training_rows


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


def write_rows(folder: Path, count: int = 60) -> Task:
    draw = random.Random(0)
    words = ["étude", "a", "bb", "ccc", "東京", "🙂", "|||", "{{x}}", "\u2028", "end"]
    rows = [{"q": " ".join(draw.choices(words, k=draw.randint(1, 30))), "a": f"answer {n}"} for n in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Task(template="Q: {{ q }} ||| {{ a }}", train=load.Source("rows.jsonl"), validation=0.2, test=5)


def encoder(**changes) -> Encoder:
    return Encoder(tiny.byte_bpe(), encoder_decoder=False, **{"chat": True, "max_length": 64} | changes)


def test_workers_and_one_process_store_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = write_rows(tmp_path)
    bytes_of = []
    for workers, chunk in ((1, 1000), (2, 7)):
        monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / f"cache{workers}"))
        for module, few in ((load, "FEW"), (stored, "FEW")):
            monkeypatch.setattr(module, "CHUNK", chunk)
            monkeypatch.setattr(module, few, chunk)
        examples = load_examples(task, tmp_path, 3, workers)
        rows = stored_rows(encoder(), examples.train, examples.train.key, 0, workers)
        assert list(rows) == encode_all(encoder(), examples.train)
        assert rows.lengths().tolist() == [len(row) for row in rows]
        assert rows.cut_rows == [row.id for row in rows if row.cut]
        files = [*examples.train.folder.iterdir(), *rows.folder.iterdir()]
        bytes_of.append({path.name: path.read_bytes() for path in files if path.name != "whole.json"})
        assert [len(examples.train), len(examples.validation), len(examples.test)] == [43, 12, 5]
        ids = [one.id for split in (examples.train, examples.validation, examples.test) for one in split]
        assert sorted(ids) == sorted(f"rows.jsonl:{n}" for n in range(1, 61))
    assert bytes_of[0] == bytes_of[1]
    assert len(bytes_of[0]) > 8


def test_examples_come_back_as_they_were() -> None:
    every = Example("r", "p \ud800 é", "c", ("c", "d"), ("x", "y"), "be kind", (("q", "a"), ("r", "b")), 1)
    for one in (every, Example("r", "p", "c", ("c",)), Example("", "", "")):
        assert unpacked(json.loads(packed(one).decode("utf-8", "surrogatepass"))) == one


def test_conversations_keep_the_places_of_their_answers(tmp_path: Path) -> None:
    chat = [
        {"messages": [{"role": role, "content": f"{role} {n} {turn}"} for turn in range(1 + n % 3) for role in ("user", "assistant")]}
        for n in range(12)
    ]  # fmt: skip
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    task = Task(format="messages", train=load.Source("chat.jsonl"), validation=2, test=2)
    examples = load_examples(task, tmp_path, 0)
    rows = stored_rows(encoder(max_length=200), examples.train, examples.train.key)
    assert list(rows) == encode_all(encoder(max_length=200), examples.train)
    assert any(row.earlier for row in rows)
    assert rows[-1] == rows[len(rows) - 1] and rows[2:4] == [rows[2], rows[3]]


def test_what_changes_the_rows_changes_their_place(tmp_path: Path) -> None:
    task = write_rows(tmp_path)

    def place(**given) -> tuple[Path, Path]:
        examples = load_examples(given.pop("task", task), tmp_path, given.pop("seed", 0))
        rows = stored_rows(encoder(**given.pop("settings", {})), examples.train, examples.train.key, **given)
        return examples.train.folder, rows.folder

    examples, rows = place()
    assert place() == (examples, rows)
    assert place(reserve=3)[0] == examples and place(reserve=3)[1] != rows
    for settings in ({"max_length": 65}, {"chat": False}):
        assert place(settings=settings)[0] == examples and place(settings=settings)[1] != rows
    changed = Task(**{**vars(task), "template": "A: {{ q }} ||| {{ a }}"})
    assert len({place(task=changed)[0], place(seed=1)[0], examples}) == 3
    renamed = Task(**{**vars(task), "name": "other", "max_new_tokens": 3})
    assert place(task=renamed) == (examples, rows), "what the rows do not depend on"
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"q": "new", "a": "row"}\n')
    assert place()[0] != examples


def test_a_row_without_room_is_named_by_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = write_rows(tmp_path)
    monkeypatch.setattr(stored, "FEW", 10)
    monkeypatch.setattr(stored, "CHUNK", 10)
    examples = load_examples(task, tmp_path, 0)
    with pytest.raises(UserError, match=r"rows.jsonl:\d+: the completion has"):
        stored_rows(encoder(max_length=10), examples.train, examples.train.key, 0, 2)
    assert not any((tmp_path / "cache" / "tokens").iterdir()), "nothing half-made stays"


def test_a_second_start_reads_no_row_and_holds_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        rows = [{"q": f"{number} {n}", "a": f"answer {n}"} for n in range(10)]
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"template": "{{ q }} ||| {{ a }}", "validation": 0.2, "test": 0.2}
    tasks = [{"name": f"t{n}", "train": f"{n}.jsonl", **shared} for n in range(30)]
    recipe = make_recipe({"data": str(tmp_path), "task": {"tasks": tasks}, "tunings": ["lora"]})

    def start():
        loaded = [(task, load_examples(task, tmp_path, 0)) for task in recipe.tasks]
        return training_rows(recipe, recipe.tunings["lora"], loaded, encoder(), 0)[0]

    first = [start().at(k) for k in range(200)]
    for module, name in ((load, "iterate_rows"), (load, "Renderer"), (stored, "EncodeChunk")):
        monkeypatch.setattr(module, name, None)
    again = start()
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, Example)], "no row is in memory"
    assert [again.at(k) for k in range(200)] == first
