"""Training: Luthier against TRL and transformers' Trainer with PEFT, the same rows, ids, steps, batch and learning rate.

    python benchmarks/train.py [--job lora] [--data FOLDER_WITH_DIALOGSUM] [--rows 96] [--repeats 3] [--dtype auto] [--json OUT.json]

Each measurement is a process of its own: the whole train call timed (useful tokens, prompt and completion, a second), the
peak of its memory, and the validation loss after. An optimizer step is 8 rows for everybody; a peer's own batch (1, 2, 4,
8, accumulated to 8) is found in the same run, each as installed and, where it is there, with tcmalloc preloaded
(Debian: libtcmalloc-minimal4). Luthier sets its allocator itself. The median of the repeats counts. Every side has the same
precision: by default the faster of bfloat16 and float32 on this machine.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

BATCH, SEED = 8, 0
TCMALLOC = next(iter(sorted(Path("/usr/lib").rglob("libtcmalloc_minimal.so.4"))), None)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Per job: our method and its settings, PEFT's configuration, learning rate.
JOBS: dict[str, dict[str, Any]] = {
    "lora": {"ours": {"method": "lora", "rank": 8, "alpha": 16}, "peft": ("LoraConfig", {"r": 8, "lora_alpha": 16, "target_modules": LINEARS}), "rate": 1e-3},
    "prompt_tuning": {"ours": {"method": "prompt_tuning", "length": 20}, "peft": ("PromptTuningConfig", {"num_virtual_tokens": 20}), "rate": 2e-2},
    "ia3": {"ours": {"method": "ia3"}, "peft": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}), "rate": 1e-2},
    "full": {"ours": {"method": "full"}, "peft": None, "rate": 5e-5},
}  # fmt: skip
SIDES = {"luthier": [1], "trainer": [1, 2, 4, 8], "trl": [8]}


def rows_of(folder: Path | None, count: int) -> tuple[list[Any], list[Any]]:
    """Encoded training rows and 20 validation rows, the same for every side."""
    from luthier.data.source import Source
    from luthier.data.task import Task
    from luthier.recipe_file import make_recipe

    if folder is None:
        recipe = make_recipe({"task": "support-dialogues", "tunings": ["zero_shot"], "retention": []})
        examples = recipe.examples(recipe.task)  # type: ignore[arg-type]
        training, held = examples.train[:count], examples.validation[:20]
    else:
        task = Task(
            template="Summarize the following conversation.\n\n{{ dialogue }} ||| {{ summary }}",
            train=Source(str(folder / "dialogsum.dev.jsonl"), limit=count + 20),
            validation=20, test=0,
        )  # fmt: skip
        recipe = make_recipe({"task": "support-dialogues", "tunings": ["zero_shot"], "retention": []})
        examples = recipe.examples(task)
        training, held = examples.train, examples.validation
    encoder = recipe.read_encoder()
    return [encoder.encode(one) for one in training], [encoder.encode(one) for one in held]


def ours(job: dict[str, Any], training: list[Any], held: list[Any], _: int, out: Path, dtype: str) -> dict[str, float]:
    from pydantic import TypeAdapter

    from luthier.encoding.order import Shuffled
    from luthier.evaluation.score import loss_and_accuracy
    from luthier.models.base import BaseModel
    from luthier.models.load import BaseSpec
    from luthier.training.loop import train
    from luthier.training.settings import TrainingSettings
    from luthier.tuning import METHODS, attach

    base = BaseModel.load(BaseSpec(dtype=dtype))
    kind = METHODS[job["ours"]["method"]]
    attach(base, "t", TypeAdapter(kind).validate_python(job["ours"]), SEED)
    settings = TrainingSettings(epochs=1, batch_size=BATCH, learning_rate=job["rate"], warmup=0.0)
    started = time.perf_counter()
    train(base, "t", Shuffled(training, SEED), settings, SEED, out)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    base.use("t")
    return {"seconds": seconds, "peak_bytes": peak * 1024, "loss": loss_and_accuracy(base, held)[0]}


def peer_model(job: dict[str, Any], dtype: str) -> Any:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from luthier.models.embedded import embedded_folder

    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(embedded_folder("smollm2-135m-instruct"), dtype=getattr(torch, dtype))
    if job["peft"] is None:
        return model
    name, settings = job["peft"]
    return peft.get_peft_model(model, getattr(peft, name)(task_type="CAUSAL_LM", **settings))


def arguments(job: dict[str, Any], batch: int, out: Path) -> dict[str, Any]:
    return {
        "output_dir": str(out), "per_device_train_batch_size": batch, "gradient_accumulation_steps": BATCH // batch,
        "num_train_epochs": 1, "learning_rate": job["rate"], "lr_scheduler_type": "linear", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "save_strategy": "no", "report_to": [], "use_cpu": True, "seed": SEED,
        "disable_tqdm": True, "logging_strategy": "no", "dataloader_pin_memory": False, "gradient_checkpointing": False,
    }  # fmt: skip


def trainer(
    job: dict[str, Any], training: list[Any], held: list[Any], batch: int, out: Path, dtype: str
) -> dict[str, float]:
    """transformers' Trainer with PEFT, rows grouped by length, loss on the completion."""
    import torch
    from transformers import Trainer, TrainingArguments

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)
        pad = lambda row, key, value: row[key] + [value] * (longest - len(row[key]))  # noqa: E731
        return {
            "input_ids": torch.tensor([pad(row, "input_ids", 0) for row in rows]),
            "attention_mask": torch.tensor([pad({"m": [1] * len(row["input_ids"])}, "m", 0) for row in rows]),
            "labels": torch.tensor([pad(row, "labels", -100) for row in rows]),
        }

    data = [{"input_ids": r.prompt + r.target, "labels": [-100] * len(r.prompt) + r.target} for r in training]
    grouped = {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
    model = peer_model(job, dtype)
    made = Trainer(model=model, args=TrainingArguments(**arguments(job, batch, out), **grouped), train_dataset=data, data_collator=collate)  # fmt: skip
    return timed(made.train, model, held)


def trl(
    job: dict[str, Any], training: list[Any], held: list[Any], batch: int, out: Path, dtype: str
) -> dict[str, float]:
    """TRL's SFTTrainer as its guide has it, on rows tokenized beforehand: loss on the completion."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from luthier.models.embedded import embedded_folder

    data = Dataset.from_list(
        [
            {"input_ids": r.prompt + r.target, "completion_mask": [0] * len(r.prompt) + [1] * len(r.target)}
            for r in training
        ]
    )
    model = peer_model(job, dtype)
    settings = SFTConfig(**arguments(job, batch, out), max_length=None, completion_only_loss=True)
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder("smollm2-135m-instruct"))
    made = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    return timed(made.train, made.model, held)


def timed(run: Any, model: Any, held: list[Any]) -> dict[str, float]:
    """The train call's seconds, the peak of memory, and the loss on the held-out targets, row by row."""
    import torch

    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in held:
            ids = torch.tensor([row.prompt + row.target])
            logits = model(input_ids=ids).logits[0, -len(row.target) - 1 : -1].float()
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(row.target), reduction="sum"))
            count += len(row.target)
    return {"seconds": seconds, "peak_bytes": peak * 1024, "loss": total / count}


def measure(given: argparse.Namespace, side: str, batch: int, tcmalloc: bool) -> dict[str, float] | None:
    """One run in a process of its own; None where it failed."""
    environment = dict(os.environ)
    if tcmalloc:
        environment["LD_PRELOAD"] = str(TCMALLOC)
    command = [
        sys.executable,
        __file__,
        "--job",
        given.job,
        "--rows",
        str(given.rows),
        "--run",
        side,
        "--batch",
        str(batch),
        "--dtype",
        given.dtype,
    ]
    command += ["--data", str(given.data)] if given.data else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{side} at batch {batch} failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return None
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    how = f"{side} batch {batch}{', tcmalloc' if tcmalloc else ''}"
    print(
        f"{how:32} {found['rate']:6.0f} tokens/s  {found['peak_bytes'] / 1e9:5.1f} GB  loss {found['loss']:.4f}",
        flush=True,
    )
    return found


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def compare(given: argparse.Namespace) -> list[dict[str, Any]]:
    mine = median([found for _ in range(given.repeats) if (found := measure(given, "luthier", 1, False))])
    results = []
    for side in [one for one in given.peers.split(",") if one]:
        ways = [(batch, preload) for batch in SIDES[side] for preload in ([False, True] if TCMALLOC else [False])]
        tried = {way: found for way in ways if (found := measure(given, side, *way))}
        if not tried:
            continue
        best = max(tried, key=lambda way: tried[way]["rate"])
        for what, way in {"as installed": (8, False), "at its best": best}.items():
            runs = [tried[way]] if way in tried else []
            runs += [found for _ in range(given.repeats - 1) if (found := measure(given, side, *way))]
            theirs = median(runs)
            results.append(
                {
                    "job": given.job, "dtype": given.dtype, "peer": f"{side}, {what} (batch {way[0]}{', tcmalloc' if way[1] else ''})",
                    "peer_value": theirs["rate"], "ours": mine["rate"], "speed_ratio": mine["rate"] / theirs["rate"],
                    "memory_ratio": mine["peak_bytes"] / theirs["peak_bytes"],
                    "peer_peak_bytes": theirs["peak_bytes"], "our_peak_bytes": mine["peak_bytes"],
                    "loss_peer": theirs["loss"], "loss_ours": mine["loss"],
                }
            )  # fmt: skip
    for one in results:
        print(
            f"{one['job']}: {one['peer']}: {one['peer_value']:.0f} tokens/s, luthier {one['ours']:.0f}: "
            f"{one['speed_ratio']:.2f} x as fast, {one['memory_ratio']:.2f} of the memory, "
            f"loss {one['loss_peer']:.4f} and {one['loss_ours']:.4f}"
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=JOBS, default="lora")
    parser.add_argument("--data", type=Path, help="a folder with dialogsum.dev.jsonl; default: what ships with Luthier")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default="trainer,trl")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=BATCH, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        training, held = rows_of(given.data, given.rows)
        side = {"luthier": ours, "trainer": trainer, "trl": trl}[given.run]
        with tempfile.TemporaryDirectory() as out:
            found = side(JOBS[given.job], training, held, given.batch, Path(out), given.dtype)
        print(json.dumps({**found, "rate": sum(map(len, training)) / found["seconds"]}))
        return
    if given.dtype == "auto":
        import torch

        from luthier.models.load import resolve_dtype

        given.dtype = str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    print(f"precision: {given.dtype}", flush=True)
    results = compare(given)
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
