import json
from pathlib import Path

import pytest

from luthier.data.source import Source, read_rows
from luthier.errors import UserError


def test_jsonl_and_csv_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [{"a": 'x, "y"\nz', "b": "1"}, {"a": "é 東京", "b": ""}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    (tmp_path / "r.csv").write_text('a,b\n"x, ""y""\nz",1\né 東京,\n', encoding="utf-8")
    for name in ("r.jsonl", "r.csv"):
        assert [row.values for row in read_rows(Source(name), tmp_path)] == rows
    assert [row.id for row in read_rows(Source("r.jsonl"), tmp_path)] == ["r.jsonl:1", "r.jsonl:3"]


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
    ],
)
def test_bad_files_name_file_and_line(tmp_path: Path, content: str | bytes | None, words: list[str]) -> None:
    if content is not None:
        (tmp_path / "r.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_rows(Source("r.jsonl"), tmp_path)
    for word in words:
        assert word in str(caught.value)


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
    with pytest.raises(UserError, match=r"'.xml'. Readable: .jsonl"):
        read_rows(Source("r.xml"), tmp_path)
