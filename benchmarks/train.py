"""Training: Luthier against TRL and transformers' Trainer with PEFT, the same rows, ids, steps, batch and learning rate.

    python benchmarks/train.py [--job lora] [--data FOLDER_WITH_DIALOGSUM] [--rows 96] [--repeats 3] [--dtype auto]
                               [--ways 'batch 1, batch 2 grouped'] [--device cpu] [--json OUT.json]
                               [--training '{}' --training '{"gradient_checkpointing": true}']
    python benchmarks/train.py --job lora --profile

Each measurement is a process of its own: the whole train call timed (useful tokens, prompt and completion, a second), the
peak of its memory, and the validation loss after, which has to be within 2 % of the peer's. An optimizer step is 8 rows
for everybody. A peer as installed takes the very rows of Luthier's steps in padded batches of 8; its best is found in the
same run: batches of 1, 2, 4, 8 accumulated to 8 rows, grouped by length, for TRL packed too, each without and, where it
is there, with tcmalloc preloaded (Debian: libtcmalloc-minimal4). Luthier sets its allocator itself and is measured with
tcmalloc as well; `--training` more than once compares Luthier under each of these settings with the same runs of the peer.
The median of the repeats counts, all sides in turn. Every side has the same precision: by default the faster of bfloat16
and float32 on this machine. `--profile` trains Luthier alone and says where its step goes.

Peers are in the extra `peers`: pip install -e '.[peers,quantize]' -c constraints.txt. `adapters` asks for another transformers:
python -m venv V && V/bin/pip install adapters==1.3.0 torch==2.13.0 accelerate, then --adapters-python V/bin/python.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from training.jobs import BATCH, JOBS, read_rows, write_rows, write_t5
from training.sides import AS_INSTALLED, SIDES, Way, Work, ways
from training.table import Measured, entry, median, table

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

# What --training may set: it changes what is held, not what is learnt.
OWN = {"micro_batch_tokens", "gradient_checkpointing"}
TCMALLOC = next(iter(sorted(Path("/usr/lib").rglob("libtcmalloc_minimal.so.4"))), None)
MODES = [False, True] if TCMALLOC else [False]


@dataclass(frozen=True)
class Run:
    """What is measured: a side, how it lays out its steps, and of Luthier the settings of its own, as JSON."""

    side: str
    way: Way = AS_INSTALLED
    own: str = "{}"


class Bench:
    """One job with its rows and model: measures one side after another, each in a process of its own."""

    def __init__(self, given: argparse.Namespace, folder: Path):
        from luthier.models.embedded import embedded_folder

        self.given, self.job, self.rows = given, JOBS[given.job], folder / "rows.json"
        self.modes, self.own = MODES if given.device == "cpu" else [False], list(map(json.dumps, given.training))
        self.model = given.model or embedded_folder("smollm2-135m-instruct")
        self.tokens = write_rows(self.rows, str(self.model), given.data, given.rows, self.job.t5)
        if self.job.t5:
            write_t5(folder / "t5", self.model)
            self.model = folder / "t5"

    def measure(self, run: Run) -> Measured | None:
        """One run; None where it failed."""
        environment = os.environ | ({"LD_PRELOAD": str(TCMALLOC)} if run.way.tcmalloc else {})
        told = {"job": self.given.job, "rows": str(self.rows), "model": str(self.model), "dtype": self.given.dtype}
        told |= {"device": self.given.device, "side": run.side, "way": asdict(run.way), "own": json.loads(run.own)}
        python = str(self.given.adapters_python) if run.side == "adapters" else sys.executable
        command = [python, __file__, "--run", json.dumps(told)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        how = f"{run.side} {run.way}"
        if run.side in ("luthier", "profile"):
            number = f" ({self.own.index(run.own) + 1})" if len(self.own) > 1 else ""
            how = f"luthier{number}{', tcmalloc' if run.way.tcmalloc else ''}"
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            print(f"{how} failed: {said[-1]}", flush=True)
            return None
        found: Measured = json.loads(done.stdout.strip().splitlines()[-1])
        found["rate"] = self.tokens / found["seconds"]
        print(
            f"{how:33}{found['rate']:6.0f} tok/s{found['peak_bytes'] / 1e9:6.2f} GB{found['steps']:4d} steps  "
            f"loss {found['loss']:7.4f}",
            flush=True,
        )
        return found

    def compare(self) -> list[dict[str, Any]]:
        """Luthier against each peer as installed and at its best. Everything is measured once, then what is compared in turn,
        again and again: a machine that slows down does so for all.
        """
        ours = [Run("luthier", replace(AS_INSTALLED, tcmalloc=mode), own) for own in self.own for mode in self.modes]
        runs = {one: [self.measure(one)] for one in ours}
        if None in (one for (one,) in runs.values()):
            raise SystemExit("Luthier could not be measured.")
        named: dict[str, Run] = {}
        fastest = set()
        for side in self.peers():
            tried = {one: found for one in self.tries(side) if (found := self.measure(one))}
            if tried:
                best = max(tried, key=lambda one: tried[one]["rate"])
                fastest.add(best)
                named |= {f"{side} as installed": Run(side), f"{side} {best.way}": best}
                runs |= {one: [tried[one]] for one in (Run(side), best) if one in tried}
        for _ in range(self.given.repeats - 1):
            for one, each in runs.items():
                each.append(self.measure(one))
        found = {one: _median(one.side, each) for one, each in runs.items()}
        results = []
        for own in self.own:
            mine = [found[one] for one in ours if one.own == own]
            results += [
                self.said(entry(self.given.job, name, found[one], *mine), own, best=one in fastest)
                for name, one in named.items()
                if one in found
            ] or [self.said(entry(self.given.job, None, None, *mine), own)]
        return results

    def tries(self, side: str) -> list[Run]:
        """The ways in which a peer is tried."""
        layouts = [way for way in ways(side, read_rows(self.rows)[0]) if self.asked(way)]
        return [Run(side, replace(way, tcmalloc=mode)) for way in layouts for mode in self.modes]

    def asked(self, way: Way) -> bool:
        """Whether a way is to be tried."""
        if way == AS_INSTALLED:
            return not self.given.best_only
        return self.given.ways is None or str(way) in [one.strip() for one in self.given.ways.split(",")]

    def peers(self) -> list[str]:
        """The peers of the job, or those asked for."""
        asked = (
            list(self.job.peers) if self.given.peers is None else [one for one in self.given.peers.split(",") if one]
        )
        if "trl" in asked and _version("trl") is None:
            print("trl is not installed (the extra `peers`): left out", flush=True)
            asked = [one for one in asked if one != "trl"]
        if "adapters" in asked and self.given.adapters_python is None:
            print("--adapters-python names no environment that has adapters: left out", flush=True)
            asked = [one for one in asked if one != "adapters"]
        # With float32 weights there are no masters beside them.
        return [one for one in asked if one != "masters" or self.given.dtype == "bfloat16"]

    def profile(self) -> list[dict[str, Any]]:
        """Luthier alone, with the matrix products of its steps."""
        from training.profile import text

        found = self.measure(Run("profile", own=self.own[0]))
        if found is None:
            raise SystemExit("The profile could not be taken.")
        print(f"\n{text(found['profile'])}")  # type: ignore[arg-type]
        return [self.said(entry(self.given.job, None, None, found), self.own[0]) | {"profile": found["profile"]}]

    def said(self, one: dict[str, Any], own: str, **more: Any) -> dict[str, Any]:
        """An entry with what it was measured on."""
        versions = {name: _version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")}
        shared = {
            "dtype": self.given.dtype,
            "device": self.given.device,
            "rows": self.given.rows,
            "repeats": self.given.repeats,
            "batch": BATCH,
            "training": json.loads(own),
        }
        return one | more | shared | {"note": self.job.note, "versions": versions}


def _median(side: str, runs: list[Measured | None]) -> Measured:
    """Of the runs that did not fail."""
    done = [one for one in runs if one]
    if not done:
        raise SystemExit(f"{side} could not be measured.")
    return median(done)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(told: dict[str, Any]) -> None:
    training, held = read_rows(Path(told["rows"]))
    with tempfile.TemporaryDirectory() as out:
        work = Work(
            JOBS[told["job"]], training, held, Path(told["model"]), told["dtype"], Way(**told["way"]), Path(out),
            told["device"], told["own"],
        )  # fmt: skip
        found = SIDES[told["side"]](work)
    print(json.dumps(found))


def _jobs() -> str:
    lines = ["jobs:"]
    for name, job in JOBS.items():
        said = f"{name:20} against {', '.join(job.peers) or 'nobody'}{f': {job.note}' if job.note else ''}"
        lines.append(textwrap.fill(said, 100, initial_indent="  ", subsequent_indent=" " * 23))
    return "\n".join(lines)


def _settings(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} must be an object")
    if unknown := set(found) - OWN:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(sorted(OWN))}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_jobs(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", choices=JOBS, default="lora")
    parser.add_argument("--data", type=Path, help="a folder with dialogsum.dev.jsonl; default: what ships with Luthier")
    parser.add_argument(
        "--model", type=Path, help="a folder with a model of Llama's architecture; default: SmolLM2-135M"
    )
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", help="of the job's peers, these (comma-separated; empty: none)")
    parser.add_argument(
        "--ways", help="beside as installed try only these, comma-separated: batch 1, batch 2 grouped, packed 1024 ..."
    )
    parser.add_argument("--best-only", action="store_true", help="leave a peer as installed out")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--training",
        type=_settings,
        action="append",
        metavar="JSON",
        help="settings of Luthier's training that say what it holds: '{\"micro_batch_tokens\": 512}', "
        "'{\"gradient_checkpointing\": true}'; more than once: each; default: its own",
    )
    parser.add_argument("--adapters-python", type=Path, help="the Python of an environment with adapters")
    parser.add_argument("--profile", action="store_true", help="Luthier alone: its matrix products")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        _run(json.loads(given.run))
        return
    for key in ("rows", "repeats"):
        if getattr(given, key) < 1:
            parser.error(f"--{key} is {getattr(given, key)}; it must be at least 1")
    given.training = given.training or [{}]
    known = set(SIDES) - {"luthier", "profile"}
    if unknown := set(filter(None, (given.peers or "").split(","))) - known:
        parser.error(f"--peers: {', '.join(sorted(unknown))} is none of {', '.join(sorted(known))}")
    if given.dtype == "auto":
        import torch

        from luthier.models.load import resolve_dtype

        given.dtype = str(resolve_dtype("auto", torch.device(given.device))).removeprefix("torch.")
    print(f"{given.job}, {given.dtype} on {given.device}, {given.rows} rows", flush=True)
    for number, one in enumerate(given.training if len(given.training) > 1 else [], 1):
        print(f"luthier ({number}): {json.dumps(one) if one else 'its defaults'}", flush=True)
    if JOBS[given.job].note:
        print(textwrap.fill(f"({JOBS[given.job].note}.)", 80), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given, Path(folder))
        results = bench.profile() if given.profile else bench.compare()
    for own in [] if given.profile else given.training:
        print(f"\nLuthier with {json.dumps(own) if own else 'its defaults'}")
        print(table([one for one in results if one["training"] == own]))
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
