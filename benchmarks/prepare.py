"""Rendering and tokenizing: Luthier against `datasets.map`, the same rows, tokenizer, template and number of processes.

    python benchmarks/prepare.py [--file ROWS.jsonl] [--json OUT.json]
    python benchmarks/prepare.py --million [--rows 1000000]
    python benchmarks/prepare.py --tasks 2000

The first compares rows a second, a first start on new data each time, and shows that the ids are equal. Rows need
`dialogue` and `summary`; by default those that ship with Luthier, their words put together anew. The second prepares a
million rows of 200 tokens, audit included, and tells the memory and the time of a second start; the third does so for a
mixture of many tasks of 30 rows.
"""

import argparse
import itertools
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


def two_starts(folder: Path, content: dict) -> dict:
    """A recipe's rows loaded, audited and encoded twice, each time in a process of its own, so that its peak memory is its own."""
    time.sleep(3)  # a file changed just now is not yet remembered by its times
    (folder / "recipe.json").write_text(json.dumps(content))
    for name in ("bases", "downloads"):
        (folder / "cache").mkdir(exist_ok=True)
        (folder / "cache" / name).symlink_to(cache_folder().absolute() / name)
    environment = {**os.environ, "LUTHIER_CACHE": str(folder / "cache")}
    found = {}
    for start in ("first", "second"):
        command = [sys.executable, __file__, "--start", str(folder / "recipe.json")]
        said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        found[start] = json.loads(said.strip().split("\n")[-1])
        print(start, found[start], flush=True)
    return found


def million(folder: Path, rows: int) -> dict:
    write_rows(folder / "rows.jsonl", rows, 56)
    task = {"template": TEXT, "train": "rows.jsonl", "validation": 500, "test": 500}
    return {"data": str(folder), "task": task}


def many_tasks(folder: Path, count: int) -> dict:
    write_rows(folder / "rows.jsonl", 30 * count, 56)
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    tasks = []
    for number in range(count):
        (folder / f"{number}.jsonl").write_text("".join(lines[30 * number : 30 * number + 30]))
        tasks.append({"name": f"t{number}", "template": TEXT, "train": f"{number}.jsonl"})
    return {"data": str(folder), "task": {"tasks": tasks}}


def one_start(file: Path) -> dict:
    from luthier.audit_rows import audit
    from luthier.models import base  # noqa: F401 (imports are not part of the start)
    from luthier.recipe_file import make_recipe
    from luthier.training_rows import training_rows

    marks = [time.perf_counter()]
    recipe = make_recipe({**json.loads(file.read_text()), "tunings": {"lora": {}}, "retention": [], "max_length": 2048})
    marks.append(time.perf_counter())
    loaded = [recipe.examples(task) for task in recipe.tasks]
    marks.append(time.perf_counter())
    found = audit(recipe, loaded)
    marks.append(time.perf_counter())
    tasks = list(zip(recipe.tasks, loaded, strict=True))
    stream, _ = training_rows(recipe, recipe.tunings["lora"], tasks, recipe.read_encoder(), 0)
    stream.at(0)
    marks.append(time.perf_counter())
    parts = [after - before for before, after in itertools.pairwise(marks)]
    tokens = sum(len(stream.at(k)) for k in range(len(stream)))
    return {
        "rows": len(stream),
        "tokens_per_row": round(tokens / len(stream), 1),
        "seconds_to_start": round(sum(parts), 2),
        "of_which": dict(zip(("recipe", "load", "audit", "encode"), (round(part, 2) for part in parts), strict=True)),
        "findings": len(found),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "largest_worker_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tasks", type=int)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.start:
        print(json.dumps(one_start(given.start)))
        return
    if given.million or given.tasks:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            content = many_tasks(folder, given.tasks) if given.tasks else million(folder, given.rows)
            result: object = two_starts(folder, content)
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
