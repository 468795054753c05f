"""Streamed rows: their order is a function of seed, shards and buffer, and going on replays one shard."""

import gzip
import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from tests import tiny

from luthier.data.load import RenderedStream, load_examples
from luthier.data.source import Source
from luthier.data.streams import RowStream
from luthier.data.task import Task
from luthier.encoding.encoder import Encoded, Encoder
from luthier.encoding.order import Mixed, Shuffled, Streamed
from luthier.errors import UserError
from luthier.recipe_file import make_recipe

SIZES = [7, 0, 19, 11]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, size in enumerate(SIZES):
        lines = "".join(json.dumps({"q": f"question {number} {n}", "a": f"{number} {n}"}) + "\n" for n in range(size))
        (tmp_path / f"part-{number}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return tmp_path


def task(**given: object) -> Task:
    source = Source("part-*.jsonl.gz", stream=True, buffer=4)
    return Task(template="{{ q }} ||| {{ a }}", train=replace(source, **given), validation=0, test=0)


def encoder() -> Encoder:
    return Encoder(tiny.byte_bpe(), encoder_decoder=False, chat=False, max_length=200)


def streamed(folder: Path, seed: int = 0, **given: object) -> Streamed:
    examples = load_examples(task(**given), folder, seed)
    assert examples.stream is not None
    return Streamed(examples.stream, encoder().encode_all, 1000)


def ids(stream: Streamed, count: int, start: int = 0) -> list[str]:
    return [stream.at(k).id for k in range(start, start + count)]


def test_each_pass_gives_every_row_once_in_an_order_of_its_own(folder: Path) -> None:
    total = sum(SIZES)
    three = ids(streamed(folder), 3 * total)
    passes = [three[start : start + total] for start in range(0, 3 * total, total)]
    every = {f"part-{number}.jsonl.gz:{n + 1}" for number, size in enumerate(SIZES) for n in range(size)}
    assert all(Counter(one) == Counter(every) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    inside = [name for name in passes[0] if name.startswith("part-2")]
    assert inside != sorted(inside, key=lambda name: int(name.rpartition(":")[2])), "the buffer shuffles a shard"
    # Shards follow one another: reading is sequential, whatever the order of rows inside.
    shards = [name.partition(".")[0] for name in passes[0]]
    assert len([one for one, next_ in itertools.pairwise(shards) if one != next_]) == 2


def test_the_order_is_a_function_of_seed_shards_and_buffer(folder: Path) -> None:
    assert ids(streamed(folder), 80) == ids(streamed(folder), 80)
    assert ids(streamed(folder), 80) != ids(streamed(folder, seed=1), 80)
    assert ids(streamed(folder), 80) != ids(streamed(folder, buffer=5), 80)
    unshuffled = ids(streamed(folder, buffer=1), sum(SIZES))
    inside = [name for name in unshuffled if name.startswith("part-2")]
    assert inside == [f"part-2.jsonl.gz:{n + 1}" for n in range(19)]


@pytest.mark.parametrize("stop", [0, 3, 7, 8, 20, 37, 61, 74])
def test_going_on_replays_one_shard_at_most(folder: Path, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, first = streamed(folder), streamed(folder)
    expected = [whole.at(k) for k in range(100)]
    for k in range(stop):
        first.at(k)
    state = json.loads(json.dumps(first.state()))
    opened: list[tuple[int, int]] = []
    shard = RowStream.shard
    monkeypatch.setattr(
        RowStream, "shard", lambda self, turn, one: opened.append((turn, one)) or shard(self, turn, one)
    )
    again = streamed(folder)
    opened.clear()
    again.restore(state)
    assert [again.at(k) for k in range(stop, stop + 1)] == [expected[stop]]
    # Besides the shard that was being read, only empty ones and the next are opened to find the next row.
    assert len([one for one in opened if SIZES[one[1]]]) <= 2
    assert [again.at(k) for k in range(stop + 1, 100)] == expected[stop + 1 :]
    assert again.left_out == whole.left_out and again.tokens == whole.tokens


def test_rows_that_cannot_be_trained_on_are_left_out_and_counted(folder: Path) -> None:
    rows = [{"q": "fine", "a": "yes"}, {"q": "no answer", "a": ""}, {"q": "long", "a": "far " * 300}]
    (folder / "part-9.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = streamed(folder, path="part-9.jsonl")
    assert ids(stream, 4) == ["part-9.jsonl:1"] * 4
    assert stream.left_out in (6, 7, 8)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_stream_that_holds_nothing_to_train_on_says_so(folder: Path, shards: int) -> None:
    for number in range(shards):
        (folder / f"nothing-{number}.jsonl").write_text(json.dumps({"q": "no answer", "a": ""}) + "\n")
    nothing = Streamed(RenderedStream(task(path="nothing-*.jsonl"), folder, 0, None), encoder().encode_all, 10)
    with pytest.raises(UserError, match="hold no row that can be trained on"):
        nothing.at(0)


def test_a_mixture_draws_from_streams_and_files(folder: Path) -> None:
    rows = [Encoded(f"file {n}", [1], [2]) for n in range(5)]
    fresh = lambda: Mixed([streamed(folder), rows], [0.75, 0.25], 100, 0)  # noqa: E731
    one = fresh()
    whole = [one.at(k).id for k in range(90)]
    counted = Counter("file" if name.startswith("file") else "stream" for name in whole)
    assert abs(counted["file"] - 0.25 * 90) <= 8
    assert [name for name in whole if not name.startswith("file")] == ids(streamed(folder), counted["stream"])
    stopped, again = fresh(), fresh()
    for k in range(41):
        stopped.at(k)
    again.restore(json.loads(json.dumps(stopped.state())))
    assert [again.at(k).id for k in range(41, 90)] == whole[41:]
    assert Shuffled(rows, 0).state() == {}


def test_a_sample_stands_for_the_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.data.streams.SAMPLE", 9)
    examples = load_examples(task(), folder, 0)
    assert [one.id for one in examples.train] == ids(streamed(folder), 9)
    (folder / "test.jsonl").write_text(json.dumps({"q": "held out", "a": "x"}) + "\n")
    given = {
        "data": str(folder),
        "task": {
            "template": "{{ q }} ||| {{ a }}",
            "train": {"path": "part-*.jsonl.gz", "stream": True},
            "validation": 0,
            "test": "test.jsonl",
        },
        "tunings": {"lora": {"training": {"max_steps": 3}}},
        "retention": [],
    }
    from luthier.audit_rows import audit

    found = [one for one in audit(make_recipe(given)) if one.kind == "a sample was audited"]
    assert len(found) == 1 and found[0].level == "warning" and found[0].count == 9
    assert "the first 9 in training order were audited" in found[0].advice


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {}}, "say how long 'lora' is trained with training.max_steps"),
        ({"validation": 0.1}, "validation cannot be split off them"),
        ({"test": {"path": "x.jsonl", "stream": True}}, "`stream` is for training rows"),
        ({"train": {"path": "x.jsonl", "stream": True, "limit": 5}}, "a streamed source has no `limit`"),
        ({"train": {"path": "x.jsonl", "stream": True, "buffer": 0}}, "buffer is 0"),
    ],
)
def test_mistakes_are_explained(changes: dict, message: str) -> None:
    training = changes.pop("training", {"max_steps": 3})
    split = {"train": {"path": "x.jsonl", "stream": True}, "validation": 0, "test": "t.jsonl"}
    given = {"task": {"template": "x", **split, **changes}, "tunings": {"lora": {"training": training}}}
    with pytest.raises(UserError) as caught:
        make_recipe(given)
    assert message in str(caught.value)
    inner = {"template": "x", **split, "name": "a"}
    with pytest.raises(UserError, match="give it a `rate`"):
        make_recipe({"task": {"tasks": [inner]}, "tunings": {"lora": {}}})
    with pytest.raises(UserError, match="its only form is zero_shot"):
        make_recipe(
            {"task": {"tasks": [{"task": inner, "rate": 1, "forms": {"few_shot": 1}}]}, "tunings": {"lora": {}}}
        )


def test_shards_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"q": f"q{n}", "a": f"a{n}"} for n in range(40)])
    rows.save_to_disk(str(tmp_path / "saved"))
    every = {f"q{n}" for n in range(40)}
    stream = RowStream(Source("saved", stream=True), tmp_path, 0)
    assert len(stream.shards) == 16
    assert {row.values["q"] for shard in stream.order(0) for row in stream.shard(0, shard)} == every
    asked = []

    def load_dataset(name: str, streaming: bool):
        asked.append((name, streaming))
        return datasets.IterableDatasetDict({"train": rows.to_iterable_dataset(num_shards=5)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    stream = RowStream(Source("hub:some/rows", split="train", stream=True), tmp_path, 0)
    found = [row for shard in stream.order(0) for row in stream.shard(0, shard)]
    assert asked == [("some/rows", True)] and len(stream.shards) == 5
    assert {row.values["q"] for row in found} == every and len({row.id for row in found}) == 40
