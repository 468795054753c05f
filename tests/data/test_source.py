import json
from pathlib import Path

import pytest

from luthier.data.source import Source, read_rows, source_digest
from luthier.errors import UserError


def test_jsonl_and_csv_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [{"a": 'x, "y"\nz', "b": "1"}, {"a": "é 東京", "b": ""}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    (tmp_path / "r.csv").write_text('a,b\n"x, ""y""\nz",1\né 東京,\n', encoding="utf-8")
    for name in ("r.jsonl", "r.csv"):
        assert [row.values for row in read_rows(Source(name), tmp_path)] == rows
    assert [row.id for row in read_rows(Source("r.jsonl"), tmp_path)] == ["r.jsonl:1", "r.jsonl:3"]


def test_every_format_and_compression_holds_the_same_rows(tmp_path: Path) -> None:
    import bz2
    import gzip
    import lzma

    import pyarrow
    from pyarrow import parquet

    rows = [{"a": f"x{n} é\u2028", "b": str(n)} for n in range(5)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "r.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "r.json").write_text(json.dumps(rows))
    (tmp_path / "d.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "r.tsv").write_text("a\tb\n" + "".join(f"{row['a']}\t{row['b']}\n" for row in rows), encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    for suffix, module in (("gz", gzip), ("bz2", bz2), ("xz", lzma)):
        (tmp_path / f"r.jsonl.{suffix}").write_bytes(module.compress(lines.encode()))
    for file in tmp_path.iterdir():
        assert [row.values for row in read_rows(Source(file.name), tmp_path)] == rows, file.name
    both = read_rows(Source("r.*n*", limit=7), tmp_path)
    assert [row.id for row in both] == [f"r.json:{n}" for n in range(1, 6)] + ["r.jsonl:1", "r.jsonl:2"]
    with pytest.raises(UserError, match="No file matches"):
        read_rows(Source("q*.jsonl"), tmp_path)
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:40])
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    broken = bytearray(gzip.compress(lines.encode()))
    broken[12:16] = b"\xff\xff\xff\xff"
    (tmp_path / "z.jsonl.gz").write_bytes(broken)
    for name in ("t.jsonl.gz", "t.parquet", "z.jsonl.gz"):
        with pytest.raises(UserError, match=f"{name} .*read"):
            read_rows(Source(name), tmp_path)


def test_super_natural_instructions_current_and_irregular(shared: Path) -> None:
    for path in sorted((shared / "data" / "sni").rglob("task*.json")):
        rows = read_rows(Source(str(path)), path.parent)
        raw = json.loads(path.read_text())
        assert len(rows) == len(raw["Instances"])
        for row, instance in zip(rows, raw["Instances"], strict=True):
            outputs = instance["output"] if isinstance(instance["output"], list) else [instance["output"]]
            assert row.values["input"] == instance["input"]
            assert row.values["outputs"] == outputs
            assert row.values["output"] == outputs[0]
            assert isinstance(row.values["categories"], list)
            assert isinstance(row.values["definition"], str)


@pytest.mark.parametrize("definition", ["Do it.", ["Do it."], [], None])
def test_super_natural_instructions_by_hand(tmp_path: Path, definition) -> None:
    task = {"Definition": definition, "Categories": "QA", "Instances": [{"input": "i", "output": "o"}]}
    (tmp_path / "task9_x.json").write_text(json.dumps(task))
    values = read_rows(Source("task9_x.json"), tmp_path)[0].values
    assert values["definition"] == ("Do it." if definition else "")
    assert (values["task"], values["categories"], values["outputs"]) == ("task9_x", ["QA"], ["o"])
    task["Instances"].append({"input": "i", "output": []})
    (tmp_path / "task9_x.json").write_text(json.dumps(task))
    with pytest.raises(UserError, match="instance 2 must hold"):
        read_rows(Source("task9_x.json"), tmp_path)


def test_columns_rename_and_limit_takes_the_first(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"summary1": "s"}\n{"summary1": "t"}\n')
    rows = read_rows(Source("r.jsonl", columns={"summary": "summary1"}, limit=1), tmp_path)
    assert [row.values for row in rows] == [{"summary1": "s", "summary": "s"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["does not exist", "r.jsonl", "data"]),
        ("", ["is empty"]),
        ("\n \n", ["is empty"]),
        ('{"a": 1}\n{"a": \n', ["line 2", "not valid JSON"]),
        ('{"a": 1}\n[1]\n', ["line 2", "list"]),
        (b'{"a": "\xff\xfe"}\n', ["UTF-8"]),
        ('{"a": 1}\n{"a": ' + "[" * 100_000 + "\n", ["r.jsonl line 2", "nested too deeply"]),
        ('{"a": "\\ud83d\\ude42"}\n{"a": ["\\ud800"]}\n', ["r.jsonl line 2", "half a surrogate pair (\\ud800)"]),
    ],
)
def test_bad_files_name_file_and_line(tmp_path: Path, content: str | bytes | None, words: list[str]) -> None:
    if content is not None:
        (tmp_path / "r.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_rows(Source("r.jsonl"), tmp_path)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "r.json is nested too deeply"),
        ('[{"a": "x"}, {"a": "\\uDFFF"}]', "r.json record 2 holds half a surrogate pair"),
        (
            '{"Definition": "d", "Instances": [{"input": "\\ud800", "output": "o"}]}',
            "instance 1 holds half a surrogate",
        ),
    ],
)
def test_json_that_no_tokenizer_could_read_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_rows(Source("r.json"), tmp_path)


def test_files_of_one_name_give_ids_of_their_own(tmp_path: Path) -> None:
    for file in ("a/d1/x.jsonl", "a/d2/x.jsonl", "a/d2/y.jsonl"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text('{"t": 1}\n')
    source = Source("a/*/*.jsonl")
    assert [row.id for row in read_rows(source, tmp_path)] == ["d1/x.jsonl:1", "d2/x.jsonl:1", "y.jsonl:1"]
    before = source_digest(source, tmp_path)
    (tmp_path / "a/d1").rename(tmp_path / "a/d0")
    assert source_digest(source, tmp_path) != before, "what is kept holds the ids"


def test_a_files_name_may_look_like_a_glob(tmp_path: Path) -> None:
    (tmp_path / "data[1].jsonl").write_text('{"t": 1}\n')
    assert [row.id for row in read_rows(Source("data[1].jsonl"), tmp_path)] == ["data[1].jsonl:1"]


@pytest.mark.parametrize("odd", ["x[1]", "what?", "a*b"])
def test_the_data_folders_own_name_is_no_pattern(tmp_path: Path, odd: str) -> None:
    (tmp_path / odd / "in").mkdir(parents=True)
    for name in ("b", "a"):
        (tmp_path / odd / "in" / f"{name}.jsonl").write_text('{"t": 1}\n')
    for path in ("in/*.jsonl", "*/?.jsonl", str(tmp_path / odd.replace("[", "[[]") / "in" / "*.jsonl")):
        assert [row.id for row in read_rows(Source(path), tmp_path / odd)] == ["a.jsonl:1", "b.jsonl:1"]


def test_a_csv_field_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(f"a,b\n{'x' * 200_000},1\n")
    assert len(read_rows(Source("r.csv"), tmp_path)[0].values["a"]) == 200_000


def test_a_csv_row_of_another_width_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("a,b\n1,2\n1,2,3\n")
    with pytest.raises(UserError, match="line 3 has another number of fields"):
        read_rows(Source("r.csv"), tmp_path)


def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"a": 1, "b": 2}\n')
    with pytest.raises(UserError, match=r"no column 'c'.*It has: a, b"):
        read_rows(Source("r.jsonl", columns={"x": "c"}), tmp_path)


def test_an_unreadable_kind_names_the_readable_ones(tmp_path: Path) -> None:
    (tmp_path / "r.xml").write_text("<a/>")
    with pytest.raises(UserError, match=r"'.xml'. Readable: .jsonl, .json, .csv, .tsv, .parquet; compressed too"):
        read_rows(Source("r.xml"), tmp_path)


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"t{n}", "label": n % 2} for n in range(5)]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(str(tmp_path / "parts"))
    assert [row.values for row in read_rows(Source("one"), tmp_path)] == rows
    found = read_rows(Source("parts", columns={"body": "text"}, split="test"), tmp_path)
    assert [(row.id, row.values) for row in found] == [("parts[test]:1", {"text": "t1", "label": 1, "body": "t1"})]
    with pytest.raises(UserError, match="several parts: name one with `split`. Allowed: train, test"):
        read_rows(Source("parts"), tmp_path)
    with pytest.raises(UserError, match="no part 'tests'. Did you mean 'test'"):
        read_rows(Source("parts", split="tests"), tmp_path)


def test_a_data_set_of_the_hub_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match="hub:nobody/nothing could not be read.*is there a network"):
        read_rows(Source("hub:nobody/nothing"), tmp_path)


def test_a_split_of_a_plain_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="`split: test` is for data sets"):
        read_rows(Source("rows.jsonl", split="test"), tmp_path)
