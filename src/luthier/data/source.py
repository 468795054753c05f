"""Rows from files: JSON lines and CSV, each row with the id that error messages name."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from luthier.data.library import FOLDER
from luthier.errors import UserError

READERS = {".jsonl": "JSON lines", ".csv": "comma-separated, with a header row"}


@dataclass(frozen=True)
class Source:
    """Where the rows of one split come from.

    `columns` renames: ``{summary: summary1}`` lets a template say `summary` where the file
    says `summary1`. `limit` keeps the first rows only.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    path: str
    columns: dict[str, str] = field(default_factory=dict)
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1")


@dataclass(frozen=True)
class Row:
    """One record: its id (``file:line``) and its columns by name."""

    id: str
    values: dict[str, Any]


def read_rows(source: Source, folder: Path) -> list[Row]:
    """Read all rows of a source; relative paths resolve in `folder`.

    Raises UserError for a missing, empty or broken file (with the line) and for a column that
    is not there.
    """
    path = locate(source.path, folder)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(
            f"The data file {path} {what}. Relative paths resolve in {folder.absolute()}; "
            "set `data:` in the recipe (or --set data=FOLDER) to resolve them elsewhere."
        )
    if path.suffix not in READERS:
        allowed = ", ".join(f"{suffix} ({what})" for suffix, what in READERS.items())
        raise UserError(f"{path} ends in '{path.suffix}'. Readable: {allowed}.")
    reader = _read_jsonl if path.suffix == ".jsonl" else _read_csv
    rows = []
    try:
        for row in reader(path):
            rows.append(Row(row.id, _rename(row, source.columns)))
            if source.limit and len(rows) == source.limit:
                break
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    if not rows:
        raise UserError(f"{path} is empty: it holds no rows.")
    return rows


def locate(path: str, folder: Path) -> Path:
    """Where a source's path points: `library:` into the package, absolute as it is, else into `folder`."""
    if path.startswith("library:"):
        return FOLDER / path.removeprefix("library:")
    return folder / Path(path).expanduser()  # an absolute path stays what it is


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path} line {number} is not valid JSON: {error.msg} at column {error.colno}. "
                    f"The line begins: {line[:60].strip()!r}."
                ) from None
            if not isinstance(values, dict):
                kind = type(values).__name__
                raise UserError(f"{path} line {number} holds a {kind}; each line must be an object with named columns.")
            yield Row(f"{path.name}:{number}", values)


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for values in reader:
                where = f"{path.name}:{reader.line_num}"
                if None in values or None in values.values():
                    raise UserError(
                        f"{path} line {reader.line_num} has another number of fields than the header "
                        f"({', '.join(reader.fieldnames or [])}). Quote fields that contain commas."
                    )
                yield Row(where, dict(values))
        except csv.Error as error:
            raise UserError(f"{path} line {reader.line_num} is not valid CSV: {error}.") from None


def _rename(row: Row, columns: dict[str, str]) -> dict[str, Any]:
    missing = [column for column in columns.values() if column not in row.values]
    if missing:
        raise UserError(
            f"{row.id} has no column {missing[0]!r} (asked for by `columns`). "
            f"It has: {', '.join(map(str, row.values))}."
        )
    return {**row.values, **{name: row.values[column] for name, column in columns.items()}}
