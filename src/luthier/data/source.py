"""Rows from files, each with the id that error messages name.

JSON lines, JSON, CSV, TSV and Parquet, also compressed (.gz, .bz2, .xz), several at once by a glob; and the task
files of Super-NaturalInstructions, current and old.
"""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

from luthier.cached import file_digest
from luthier.data.formats.hub import HUB, dataset_fingerprint, read_dataset, stream_dataset
from luthier.data.library import FOLDER
from luthier.data.rows import Row
from luthier.errors import UserError

# Characters in a field of a CSV file; Python's own limit, 131,072, is shorter than some texts.
LONGEST_FIELD = 1 << 30


@dataclass(frozen=True)
class Source:
    """Where the rows of one split come from: a file, a glob whose files are read in order, a folder that `datasets`
    saved, or ``hub:NAME``, a data set of the hub; of these `split` names the part.

    `columns` renames: ``{summary: summary1}`` lets a template say `summary` where the file
    says `summary1`. `limit` keeps the first rows only. `stream` reads training rows while they are trained on and
    keeps none, file by file (of the hub: shard by shard), shuffled through a buffer of `buffer` rows.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    path: str
    columns: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    split: str | None = None
    stream: bool = False
    buffer: int = 1000

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1")
        if self.buffer < 1:
            raise ValueError(f"buffer is {self.buffer}; it must be at least 1")
        if self.stream and self.limit is not None:
            raise ValueError("a streamed source has no `limit`; training.max_steps says how much of it is trained on")


def read_rows(source: Source, folder: Path) -> list[Row]:
    """Read all rows of a source; relative paths resolve in `folder`.

    Raises UserError for a missing, empty or broken file (with the line) and for a column that
    is not there.
    """
    return list(iterate_rows(source, folder))


def iterate_rows(source: Source, folder: Path) -> Iterator[Row]:
    """The same rows, read as they are asked for."""
    number = 0
    for number, row in enumerate(_all_rows(source, folder), 1):
        yield Row(row.id, _rename(row, source.columns))
        if number == source.limit:
            return
    if not number:
        raise UserError(f"{locate(source.path, folder)} is empty: it holds no rows.")


def source_digest(source: Source, folder: Path) -> list[Any]:
    """All that decides what rows a source holds: names, contents and settings. Raises UserError as `read_rows` does."""
    settings: list[Any] = [source.columns, source.limit, source.split]
    if source.stream:  # as a whole it may be too large to read: what its files look like must do
        seen = [source.path] if source.path.startswith(HUB) else _looks(_files(source.path, folder))
        return [seen, source.buffer, *settings]
    if source.path.startswith(HUB):
        return [source.path, dataset_fingerprint(source.path, source.split, folder), *settings]
    place = locate(source.path, folder)
    if _saved_by_datasets(place):
        files = sorted(path for path in place.rglob("*") if path.is_file())
        return [place.name, [[str(path.relative_to(place)), file_digest(path)] for path in files], *settings]
    try:
        named = _files(source.path, folder)
        return [[[name, file_digest(path)] for path, name in named.items()], *settings]
    except OSError as error:
        raise UserError(f"{place} could not be read: {error}.") from None


def shards(source: Source, folder: Path) -> list[Callable[[], Iterator[Row]]]:
    """A function for each file of a source, or each shard of a hub's data set, that reads its rows from the start.

    Raises UserError as `read_rows` does.
    """
    place = locate(source.path, folder)
    if source.path.startswith(HUB) or _saved_by_datasets(place):
        readers = stream_dataset(source.path, source.split, folder)
    else:
        readers = [partial(_read, path, name) for path, name in _files(source.path, folder).items()]
    return [partial(_renamed, one, source.columns) for one in readers]


def _renamed(read: Callable[[], Iterator[Row]], columns: dict[str, str]) -> Iterator[Row]:
    for row in read():
        yield Row(row.id, _rename(row, columns))


def _looks(files: dict[Path, str]) -> list[list[Any]]:
    return [[name, (state := path.stat()).st_size, state.st_mtime_ns] for path, name in files.items()]


def _all_rows(source: Source, folder: Path) -> Iterator[Row]:
    place = locate(source.path, folder)
    if source.path.startswith(HUB) or _saved_by_datasets(place):
        yield from read_dataset(source.path, source.split, folder)
        return
    if source.split:
        raise UserError(
            f"`split: {source.split}` is for data sets of the hub and folders that `datasets` saved; {place} is neither."
        )
    for path, name in _files(source.path, folder).items():
        yield from _read(path, name)


def _saved_by_datasets(place: Path) -> bool:
    return (place / "state.json").is_file() or (place / "dataset_dict.json").is_file()


def _files(path: str, folder: Path) -> dict[Path, str]:
    """The files that a path means, in order, each with the name that its rows' ids begin with."""
    place = locate(path, folder)
    if place.is_file():  # before it is taken for a glob: names may hold brackets
        return {place: place.name}
    if any(sign in path for sign in "*?["):
        # Only what the user wrote is a pattern: the folder's own name may hold brackets.
        pattern = str(Path(path).expanduser())
        found = sorted(folder / match for match in glob.glob(pattern, root_dir=folder, recursive=True))
        if not found:
            raise UserError(f"No file matches {place}. Relative paths resolve in {folder.absolute()}.")
        times = Counter(one.name for one in found)
        steps = list(takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
        fixed = folder.joinpath(*steps)
        # Files of one name are told apart by their folders: an id names one row.
        return {one: one.name if times[one.name] == 1 else one.relative_to(fixed).as_posix() for one in found}
    what = "is a folder" if place.is_dir() else "does not exist"
    raise UserError(
        f"The data file {place} {what}. Relative paths resolve in {folder.absolute()}; "
        "set `data:` in the recipe (or --set data=FOLDER) to resolve them elsewhere."
    )


def _read(path: Path, name: str) -> Iterator[Row]:
    """The rows of a file, whose ids begin with `name`."""
    suffixes = path.suffixes[-2:]
    opener = OPENERS.get(suffixes[-1] if suffixes else "", open)
    kind = suffixes[0] if opener is not open and len(suffixes) == 2 else path.suffix
    if kind not in READERS:
        allowed = ", ".join(READERS)
        raise UserError(f"{path} ends in '{path.suffix}'. Readable: {allowed}; compressed too ({', '.join(OPENERS)}).")
    try:
        with opener(path, "rb") as file:
            for row in READERS[kind](path, file):
                yield row if name == path.name else Row(name + row.id.removeprefix(path.name), row.values)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise UserError(f"{path} could not be read: {error}.") from None


def locate(path: str, folder: Path) -> Path:
    """Where a source's path points: `library:` into the package, absolute as it is, else into `folder`."""
    if path.startswith("library:"):
        return FOLDER / path.removeprefix("library:")
    return folder / Path(path).expanduser()  # an absolute path stays what it is


def _read_jsonl(path: Path, file: Any) -> Iterator[Row]:
    for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path} line {number} is not valid JSON: {error.msg} at column {error.colno}. "
                f"The line begins: {line[:60].strip()!r}."
            ) from None
        except RecursionError:
            raise UserError(f"{path} line {number} is nested too deeply to be read.") from None
        yield _record(values, f"{path} line {number}", f"{path.name}:{number}", _ESCAPED.search(line) is not None)


def _read_json(path: Path, file: Any) -> Iterator[Row]:
    """A list of records, one under `data`, or a task file of Super-NaturalInstructions."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig").read()
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno} is not valid JSON: {error.msg}.") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be read.") from None
    escaped = _ESCAPED.search(text) is not None
    if isinstance(content, dict) and "Instances" in content:
        for number, row in enumerate(superni_rows(content, path), 1):
            yield _record(row.values, f"{path} instance {number}", row.id, escaped)
        return
    records = content.get("data") if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise UserError(f"{path} must hold a list of records, one under 'data', or a task with 'Instances'.")
    for number, values in enumerate(records, 1):
        yield _record(values, f"{path} record {number}", f"{path.name}:{number}", escaped)


def superni_rows(content: dict[str, Any], path: Path) -> Iterator[Row]:
    """Rows of a Super-NaturalInstructions task: task, definition, input, output, outputs, examples, categories.

    Old files have a bare string for `output`, `Definition` or `Categories`, an empty list of definitions, no
    ids or ids of another task: all are read; an instance without an output is refused.
    """
    definition = content.get("Definition") or [""]
    categories = content.get("Categories") or []
    shared = {
        "task": path.name.split(".")[0],
        "definition": definition[0] if isinstance(definition, list) else definition,
        "positive_examples": content.get("Positive Examples") or [],
        "negative_examples": content.get("Negative Examples") or [],
        "categories": [categories] if isinstance(categories, str) else categories,
    }
    for number, instance in enumerate(content["Instances"], 1):
        outputs = instance.get("output") if isinstance(instance, dict) else None
        outputs = [outputs] if isinstance(outputs, str) else outputs
        if not isinstance(instance, dict) or "input" not in instance or not outputs:
            raise UserError(f"{path} instance {number} must hold `input` and at least one `output`.")
        own = {"input": instance["input"], "output": outputs[0], "outputs": outputs}
        yield Row(f"{path.name}:{number}", {**shared, **own})


def _read_csv(path: Path, file: Any, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    try:
        for values in reader:
            if None in values or None in values.values():
                raise UserError(
                    f"{path} line {reader.line_num} has another number of fields than the header "
                    f"({', '.join(reader.fieldnames or [])}). Quote fields that contain the separator."
                )
            yield Row(f"{path.name}:{reader.line_num}", dict(values))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not valid CSV: {error}.") from None


def _read_tsv(path: Path, file: Any) -> Iterator[Row]:
    return _read_csv(path, file, "\t")


def _read_parquet(path: Path, file: Any) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"Reading {path} needs the package pyarrow: pip install 'luthier[parquet]'.") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path.name}:{number}", values)
    except ArrowException as error:
        raise UserError(f"{path} is no readable Parquet file: {' '.join(str(error).split())[:200]}.") from None


READERS: dict[str, Callable[[Path, Any], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


# What a half of a surrogate pair looks like in JSON: only a text with one has to be looked at more closely.
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")


def _record(values: Any, where: str, name: str, escaped: bool) -> Row:
    if not isinstance(values, dict):
        raise UserError(f"{where} holds a {type(values).__name__}; it must be an object with named columns.")
    if escaped:
        try:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where} holds half a surrogate pair (\\u{ord(error.object[error.start]):x}), which is no character. "
                "Remove it or write both halves."
            ) from None
    return Row(name, values)


def _rename(row: Row, columns: dict[str, str]) -> dict[str, Any]:
    missing = [column for column in columns.values() if column not in row.values]
    if missing:
        raise UserError(
            f"{row.id} has no column {missing[0]!r} (asked for by `columns`). "
            f"It has: {', '.join(map(str, row.values))}."
        )
    return {**row.values, **{name: row.values[column] for name, column in columns.items()}}
