"""Token ids on disk: made once by worker processes, mapped into memory, keyed by all that they depend on."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luthier.cached import cached, code_digest, digest, installed, mapped
from luthier.data.lazy import Lazy
from luthier.data.task import Example
from luthier.encoding.encoder import Encoded, Encoder
from luthier.workers import ordered_map, processors

CHUNK = 500
# Fewer rows than this are encoded here: a worker takes seconds to load the tokenizer.
FEW = 40 * CHUNK
# One row: where its ids and its name end, and how many of the ids are the prompt; tokens cut; where its learnt places end.
ROW = np.dtype([("ids", "<i8"), ("name", "<i8"), ("earlier", "<i8"), ("prompt", "<i4"), ("cut", "<i4")])


class StoredRows(Lazy[Encoded]):
    """Encoded rows of a prepared split; `lengths` and `cut_rows` of all without reading one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = {name: folder / f"{name}.bin" for name in ("ids", "names", "earlier", "rows")}
        index = json.loads((folder / "index.json").read_text())
        self._rows: int = index["rows"]
        self.cut_rows: list[str] = index["cut"]
        self._id_type = np.dtype(index["type"])

    def __len__(self) -> int:
        return self._rows

    def at(self, place: int) -> Encoded:
        """The row at `place`, read from the mapped files."""
        table = self._table()
        row = table[place]
        before = table[place - 1] if place else np.zeros((), ROW)
        ids = np.frombuffer(
            mapped(self._files["ids"]),
            self._id_type,
            count=int(row["ids"] - before["ids"]),
            offset=int(before["ids"]) * self._id_type.itemsize,
        ).tolist()
        earlier: tuple[tuple[int, int], ...] = ()
        if row["earlier"] != before["earlier"]:
            places = np.frombuffer(mapped(self._files["earlier"]), "<i4").reshape(-1, 2)
            earlier = tuple(map(tuple, places[int(before["earlier"]) : int(row["earlier"])].tolist()))
        name = mapped(self._files["names"])[int(before["name"]) : int(row["name"])].decode("utf-8", "surrogatepass")
        prompt = int(row["prompt"])
        return Encoded(name, ids[:prompt], ids[prompt:], int(row["cut"]), earlier)

    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self._table()["ids"], prepend=0)

    def prompt_lengths(self) -> np.ndarray:
        """Prompt tokens of each row."""
        return self._table()["prompt"].astype(np.int64)

    def _table(self) -> np.ndarray:
        return np.frombuffer(mapped(self._files["rows"]), ROW)


def stored_rows(
    encoder: Encoder, examples: Sequence[Example], key: str, reserve: int = 0, workers: int | None = None
) -> StoredRows:
    """The encoded rows of examples whose content `key` stands for, made where no earlier call made the same.

    Many rows are encoded by `workers` processes, by default one a core. Raises UserError as `Encoder.encode` does.
    """
    name = digest(
        {
            "code": [code_digest("luthier.data", "luthier.encoding"), installed("tokenizers")],
            "examples": key,
            "encoder": encoder.identity(),
            "reserve": reserve,
        }
    )
    return StoredRows(cached("tokens", name, lambda place: _encode(encoder, examples, reserve, workers, place)))


def _encode(encoder: Encoder, examples: Sequence[Example], reserve: int, workers: int | None, place: Path) -> None:
    id_type = np.dtype("<u2" if encoder.largest_id < 1 << 16 else "<u4")
    job = EncodeChunk(encoder, examples, reserve, id_type.str)
    ranges = (range(start, min(start + CHUNK, len(examples))) for start in range(0, len(examples), CHUNK))
    few = (workers or processors()) == 1 or len(examples) <= FEW
    chunks: Iterator[Chunk] = map(job, ranges) if few else ordered_map(job, ranges, workers)
    ends = np.zeros(3, np.int64)
    rows, cut = 0, []
    with (
        (place / "ids.bin").open("wb") as ids,
        (place / "names.bin").open("wb") as names,
        (place / "earlier.bin").open("wb") as earlier,
        (place / "rows.bin").open("wb") as table,
    ):
        for chunk in chunks:
            found = np.frombuffer(chunk.table, ROW).copy()
            for number, column in enumerate(("ids", "name", "earlier")):
                found[column] += ends[number]
                ends[number] = found[column][-1] if len(found) else ends[number]
            ids.write(chunk.ids)
            names.write(chunk.names)
            earlier.write(chunk.earlier)
            table.write(found.tobytes())
            rows += len(found)
            cut += chunk.cut
    (place / "index.json").write_text(json.dumps({"rows": rows, "cut": cut, "type": id_type.str}))


@dataclass(frozen=True)
class Chunk:
    """What a worker sends back: bytes to append, and the names of rows that were cut."""

    ids: bytes
    names: bytes
    earlier: bytes
    table: bytes
    cut: list[str]


@dataclass(frozen=True)
class EncodeChunk:
    """Encodes a range of examples; it can be sent to a worker process."""

    encoder: Encoder
    examples: Sequence[Example]
    reserve: int
    id_type: str

    def __call__(self, places: range) -> Chunk:
        """The rows of these examples, with ends that count from the range's beginning."""
        ids: list[int] = []
        names, cut = bytearray(), []
        earlier: list[tuple[int, int]] = []
        table: list[tuple[Any, ...]] = []
        for place in places:
            for row in self.encoder.encode_all(self.examples[place], self.reserve):
                ids += row.prompt
                ids += row.target
                names += row.id.encode("utf-8", "surrogatepass")
                earlier += row.earlier
                table.append((len(ids), len(names), len(earlier), len(row.prompt), row.cut))
                if row.cut:
                    cut.append(row.id)
        return Chunk(
            np.array(ids, self.id_type).tobytes(),
            bytes(names),
            np.array(earlier, "<i4").tobytes(),
            np.array(table, ROW).tobytes(),
            cut,
        )
