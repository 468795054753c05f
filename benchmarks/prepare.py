"""Rendering and tokenizing: Luthier against `datasets.map`, the same rows, tokenizer, template and number of processes.

    python benchmarks/prepare.py [--file ROWS.jsonl] [--json OUT.json]
    python benchmarks/prepare.py --million [--rows 1000000]

The first compares rows a second, a first start on new data each time, and shows that the ids are equal. Rows need
`dialogue` and `summary`; by default those that ship with Luthier, their words put together anew. The second prepares a
million rows of 200 tokens and tells the memory and the time of a second start.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

from luthier.cached import cache_folder
from luthier.data.library import FOLDER
from luthier.data.load import load_examples
from luthier.data.source import Source
from luthier.data.task import Task
from luthier.data.template import Template
from luthier.encoding.encoder import Encoded, Encoder
from luthier.encoding.stored import stored_rows
from luthier.models.load import BaseSpec, read_tokenizer

TEXT = "Summarise this dialogue in one sentence.\n\n{{ dialogue }} ||| {{ summary }}"


def encoder() -> Encoder:
    tokenizer, _ = read_tokenizer(BaseSpec())
    return Encoder(tokenizer, encoder_decoder=False, chat=True, max_length=2048)


def write_rows(path: Path, count: int, words: int) -> None:
    texts = [line for file in sorted(FOLDER.rglob("*.jsonl")) for line in file.read_text("utf-8").split("\n") if line]
    pool = sorted({word for text in texts for word in text.split()})
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            row = {"dialogue": " ".join(draw.choices(pool, k=words)), "summary": " ".join(draw.choices(pool, k=8))}
            file.write(json.dumps(row) + "\n")


def ours(file: Path, processes: int) -> Sequence[Encoded]:
    task = Task(template=TEXT, train=Source(str(file)), validation=0, test=0)
    examples = load_examples(task, file.parent, 0, processes)
    return stored_rows(encoder(), examples.train, examples.train.key, 0, processes)


def one_row(row: dict, template: Template, tokenizer: object, end: int) -> dict:
    """As trainers do it: one row at a time, prompt and completion tokenized on their own."""
    prompt, completion = template.parts(row, "row")
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return {"prompt": ids, "target": [*tokenizer(completion, add_special_tokens=False).input_ids, end]}


def many_rows(rows: dict, template: Template, tokenizer: object, end: int) -> dict:
    """The same with `batched=True`, so that the tokenizer sees 1,000 texts at a time."""
    parts = [
        template.parts({"dialogue": dialogue, "summary": summary}, "row")
        for dialogue, summary in zip(rows["dialogue"], rows["summary"], strict=True)
    ]
    chats = [[{"role": "user", "content": prompt}] for prompt, _ in parts]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    targets = tokenizer([completion for _, completion in parts], add_special_tokens=False).input_ids
    prompts = tokenizer(texts, add_special_tokens=False).input_ids
    return {"prompt": prompts, "target": [[*ids, end] for ids in targets]}


def peer(file: Path, processes: int, cache: Path, batched: bool) -> object:
    import datasets

    datasets.disable_progress_bars()
    encode = encoder()
    rows = datasets.load_dataset("json", data_files=str(file), cache_dir=str(cache), split="train")
    function = partial(
        many_rows if batched else one_row, template=Template(TEXT), tokenizer=encode.tokenizer, end=encode.end
    )
    return rows.map(function, batched=batched, num_proc=processes, remove_columns=rows.column_names)


def timed(function) -> tuple[float, object]:
    started = time.perf_counter()
    found = function()
    return time.perf_counter() - started, found


def compare(file: Path, processes: int, repeats: int) -> list[dict]:
    count = sum(1 for line in file.open("rb") if line.strip())
    bases = cache_folder().absolute()
    seconds: dict[str, list[float]] = {"ours": [], "row by row": [], "batched": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for name in ("bases", "downloads"):
                (Path(folder) / name).symlink_to(bases / name)
            os.environ["LUTHIER_CACHE"] = folder
            took, mine = timed(lambda: ours(file, processes))
            seconds["ours"].append(took)
            for name in ("row by row", "batched"):
                batched = name == "batched"
                took, theirs = timed(lambda b=batched, n=name: peer(file, processes, Path(folder) / n, b))
                seconds[name].append(took)
                for place in range(0, count, max(1, count // 500)):
                    row = mine[place]
                    assert (row.prompt, row.target) == (theirs[place]["prompt"], theirs[place]["target"]), place
    os.environ["LUTHIER_CACHE"] = str(bases)
    mine = count / statistics.median(seconds["ours"])
    results = []
    for name in ("row by row", "batched"):
        theirs = count / statistics.median(seconds[name])
        results.append(
            {
                "job": f"render and tokenize {count} rows, {processes} processes",
                "peer": f"datasets.map, {name}",
                "peer_value": theirs,
                "ours": mine,
                "speed_ratio": mine / theirs,
            }
        )
        print(f"datasets.map, {name:10}  {theirs:8,.0f} rows/s   luthier {mine:8,.0f} rows/s   {mine / theirs:.1f} x")
    return results


def million(rows: int) -> dict:
    """Each start in a process of its own, so that its peak memory is its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, rows, 56)
        time.sleep(3)  # a file changed just now is not yet remembered by its times
        for name in ("bases", "downloads"):
            (Path(folder) / "cache").mkdir(exist_ok=True)
            (Path(folder) / "cache" / name).symlink_to(cache_folder().absolute() / name)
        environment = {**os.environ, "LUTHIER_CACHE": str(Path(folder) / "cache")}
        found = {}
        for start in ("first", "second"):
            command = [sys.executable, __file__, "--start", str(file)]
            said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            found[start] = json.loads(said.strip().split("\n")[-1])
            print(start, found[start], flush=True)
        return found


def one_start(file: Path, processes: int) -> dict:
    took, rows = timed(lambda: ours(file, processes))
    _, tokens = timed(lambda: sum(len(rows[place]) for place in range(len(rows))))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "rows": len(rows),
        "tokens_per_row": round(tokens / len(rows), 1),
        "seconds_to_start": round(took, 2),
        "peak_bytes": peak,
        "largest_worker_bytes": workers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.start:
        print(json.dumps(one_start(given.start, given.processes)))
        return
    if given.million:
        result: object = million(given.rows)
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = given.file
            if file is None:
                write_rows(file := Path(folder) / "rows.jsonl", 120_000, 56)
            result = compare(file.absolute(), given.processes, given.repeats)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
