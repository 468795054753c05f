"""The plan against the real thing: what `luthier plan` counts before, and the peak of a fresh process that did it.

    python benchmarks/plan.py [--only PATTERN] [--json FILE]
    python benchmarks/plan.py --recipe RECIPE [--json FILE]

Each row is one stage of `luthier run`, in a process of its own: it loads the base, trains two steps and validates. What is
compared is its peak without what was there after the imports. Bases are the default one and random weights of real widths.
With --recipe the stages are those of a recipe, run whole, and a tuning that is trained has a row more: what it holds at its most
from then on, while it answers and is scored.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

SMOLLM2 = "smollm2-135m-instruct"
COUNTS_ANEW = Path("/proc/self/clear_refs")  # the process's peak, once 5 is written there
NF4, BF16 = {"quantize": "nf4"}, {"dtype": "bfloat16"}
CHECKPOINTING = {"gradient_checkpointing": True}
LONG = {"max_length": 512, "words": 330}

# Almost no weights: what libraries hold was read from this one (`PROCESS` in `phases.py`), so it is not counted.
FITTED = "tiny lora (fitted)"

# name -> base, what is set of it, of the recipe (`words` of the longest row), of the training, the tuning.
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    FITTED: ("tiny", {}, {}, {}, {"method": "lora"}),
    "smollm2 lora": (SMOLLM2, {}, {}, {"batch_size": 2}, {"method": "lora"}),
    "smollm2 lora checkpointing": (SMOLLM2, {}, {}, CHECKPOINTING | {"batch_size": 2}, {"method": "lora"}),
    "smollm2 lora nf4": (SMOLLM2, NF4, {}, {"batch_size": 2}, {"method": "lora"}),
    "smollm2 lora bf16": (SMOLLM2, BF16, {"words": 40}, {"batch_size": 1}, {"method": "lora"}),
    "smollm2 full checkpointing": (SMOLLM2, {}, {}, CHECKPOINTING | {"batch_size": 2}, {"method": "full"}),
    "smollm2 prompt tuning length 512": (SMOLLM2, {}, LONG, {"batch_size": 1}, {"method": "prompt_tuning"}),
    "t5 lora": ("t5", {}, {}, {}, {"method": "lora"}),
    "t5 lora batch 16 budget 2048": ("t5", {}, {}, {"batch_size": 16, "micro_batch_tokens": 2048}, {"method": "lora"}),
    "t5 lora nf4": ("t5", NF4, {}, {}, {"method": "lora"}),
    "t5 full": ("t5", {}, {}, {}, {"method": "full"}),
    "t5 full adafactor": ("t5", {}, {}, {"optimizer": "adafactor"}, {"method": "full"}),
    "t5 ia3 bf16": ("t5", BF16, {"words": 40}, {"batch_size": 4}, {"method": "ia3"}),
    "t5 prompt tuning checkpointing": ("t5", {}, {}, CHECKPOINTING, {"method": "prompt_tuning"}),
    "gpt2 lora": ("gpt2", {}, {}, {}, {"method": "lora", "rank": 16}),
    "gpt2 ia3 length 512": ("gpt2", {}, LONG, {"batch_size": 3}, {"method": "ia3"}),
    "gpt2 selective": ("gpt2", {}, {}, {}, {"method": "selective"}),
    "gpt2 prefix tuning": ("gpt2", {}, {}, {}, {"method": "prefix_tuning"}),
    "gpt2 full checkpointing": ("gpt2", {}, {}, CHECKPOINTING, {"method": "full"}),
    "gpt2 full bf16": ("gpt2", BF16, {"words": 40}, {"batch_size": 4}, {"method": "full"}),
    "qwen2 bottleneck": ("qwen2", {}, {}, {}, {"method": "bottleneck"}),
    "qwen2 lora budget 256": ("qwen2", {}, {}, {"micro_batch_tokens": 256}, {"method": "lora"}),
    "qwen2 lora length 512": ("qwen2", {}, LONG, {"batch_size": 4}, {"method": "lora"}),
    "qwen2 lora nf4 checkpointing": ("qwen2", NF4, {}, CHECKPOINTING, {"method": "lora"}),
    "qwen2 full budget 512": ("qwen2", {}, {}, {"micro_batch_tokens": 512}, {"method": "full"}),
    "qwen2 full adafactor bf16": ("qwen2", BF16, {"words": 40}, {"batch_size": 4, "optimizer": "adafactor"}, {"method": "full"}),
    "qwen2 zero-shot": ("qwen2", {}, {}, {}, {"method": "zero_shot"}),
    "qwen2 few-shot": ("qwen2", {}, {}, {}, {"method": "few_shot", "shots": 3}),
    "qwen2 interpolate": ("qwen2", {}, {}, {"micro_batch_tokens": 512}, {"method": "interpolate", "of": "whole"}),
}  # fmt: skip


def make_base(family: str, folder: Path) -> str:
    """A base of this family with random weights, and the default base's tokenizer."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
        GPT2Config,
        Qwen2Config,
        T5Config,
    )

    from luthier.models.embedded import embedded_folder

    target = folder / family
    if family == SMOLLM2 or target.is_dir():
        return family if family == SMOLLM2 else str(target)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder(SMOLLM2))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    shared = ids | {"vocab_size": len(tokenizer)}
    config: Any = {
        "qwen2": lambda: Qwen2Config(**shared, hidden_size=640, intermediate_size=1728, num_hidden_layers=6,
                                     num_attention_heads=10, num_key_value_heads=2, max_position_embeddings=2048),
        "gpt2": lambda: GPT2Config(**shared, n_embd=576, n_layer=6, n_head=9, n_positions=1024),
        "tiny": lambda: Qwen2Config(**shared, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048),
        # flan-t5-small's widths; its vocabulary is 32,128
        "t5": lambda: T5Config(**shared, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6,
                               decoder_start_token_id=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    }[family]()  # fmt: skip
    made: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    made.from_config(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)


def vocabulary() -> list[str]:
    """Words of one token each, from all over the default base's vocabulary: what is read of an embedding becomes resident."""
    from transformers import AutoTokenizer

    from luthier.models.embedded import embedded_folder

    found = AutoTokenizer.from_pretrained(embedded_folder(SMOLLM2)).get_vocab()
    return sorted(one[1:] for one in found if one[0] == "\u0120" and one[1:].isascii() and one[1:].isalpha())


def make_rows(folder: Path, words: int) -> Path:
    """60 rows of up to so many words, with answers of a quarter of that."""
    file = folder / f"rows-{words}.jsonl"
    draw, known = random.Random(0), vocabulary()
    text = lambda most: " ".join(draw.choices(known, k=draw.randint(most // 3, most)))  # noqa: E731
    file.write_text("".join(json.dumps({"text": text(words), "answer": text(words // 4)}) + "\n" for _ in range(60)))
    return file


def recipe_of(name: str, folder: Path) -> Any:
    """The recipe of one configuration; its base and rows are made."""
    from luthier.recipe_file import make_recipe

    base, of_base, of_recipe, of_training, tuning = CONFIGURATIONS[name]
    of_recipe = dict(of_recipe)
    rows = make_rows(folder, of_recipe.pop("words", 100))
    task = {"name": "rows", "template": "{{ text }} ||| {{ answer }}", "train": rows.name, "validation": 4, "test": 2}
    before = {"whole": {"method": "full"}} if tuning["method"] == "interpolate" else {}
    return make_recipe({
        "base": {"model": make_base(base, folder), "dtype": "float32", **of_base},
        "task": task | {"max_new_tokens": 1}, "data": str(folder), "retention": [], "allow": ["duplicate", "leak"],
        "training": {"max_steps": 2, "batch_size": 8, **of_training}, "tunings": {**before, "t": tuning}, **of_recipe,
    })  # fmt: skip


def compare_all(file: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Every tuning of a recipe, run whole: until it is trained, or where nothing is, in all; and from then on."""
    from luthier.directory import RunDirectory
    from luthier.plan import plan
    from luthier.recipe_file import load_recipe

    recipe = load_recipe(file)
    directory = RunDirectory.create(folder / "run", recipe, resume=False)
    for name, planned in plan(recipe, available=sys.maxsize).items():
        stage_process(directory.path, name, "--whole")
        result = directory.result(name) or {}
        imported = result["memory_after_import_bytes"]
        yield compared(name, planned.measured_phase(), planned, result["peak_memory_bytes"] - imported)
        if {"training", "answering"} <= planned.phases.keys():
            later = directory.result(f"{name}.later") or {}
            yield compared(name, "answering", planned, later["peak_memory_bytes"] - imported)


def compared(name: str, phase: str, planned: Any, measured: int) -> dict[str, Any]:
    predicted = sum(planned.phases[phase].values())
    found = {"name": name, "phase": phase, "predicted": predicted, "measured": measured}
    return found | {"error": predicted / measured - 1, "plan": asdict(planned)}


def stage_process(run: Path, name: str, *options: str) -> None:
    subprocess.run([sys.executable, __file__, "--stage", str(run), name, *options], check=True, stdout=-3, stderr=-3)


def compare(name: str, folder: Path) -> dict[str, Any]:
    """Plan one configuration, run it, and return both in bytes."""
    from luthier.directory import RunDirectory
    from luthier.plan import plan

    recipe = recipe_of(name, folder)
    planned = plan(recipe, available=sys.maxsize)["t"]
    directory = RunDirectory.create(Path(tempfile.mkdtemp(dir=folder)) / "run", recipe, resume=False)
    for stage in recipe.tunings:
        stage_process(directory.path, stage)
    result = directory.result("t") or {}
    measured = result["peak_memory_bytes"] - result["memory_after_import_bytes"]
    return compared(name, planned.measured_phase(), planned, measured)


def run_in_this_process(path: str, name: str, whole: bool) -> None:
    """The stage until what it trained is saved, where its peak is written; what is asked of the tuning later is left out.

    `whole`: that too, and its peak counted anew from there on.
    """
    from luthier.directory import RunDirectory
    from luthier.errors import Interrupted
    from luthier.models.memory import peak_bytes, resident_bytes
    from luthier.stage import run_stage

    after_import = resident_bytes()
    directory = RunDirectory.open(Path(path))
    if whole:
        counted: list[bool] = []

        def count_anew() -> bool:
            if not counted and directory.result(f"{name}.trained") is not None:
                COUNTS_ANEW.write_text("5")
                counted.append(True)
            return False

        run_stage(directory, name, should_stop=count_anew)
        directory.save_result(f"{name}.later", {"peak_memory_bytes": peak_bytes()})
        return
    try:
        run_stage(directory, name, should_stop=lambda: directory.result(f"{name}.trained") is not None)
    except Interrupted:
        result = directory.result(f"{name}.trained") or {}
        directory.save_result(name, {**result, "memory_after_import_bytes": after_import})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="names that match this pattern")
    parser.add_argument("--recipe", type=Path, metavar="RECIPE", help="the tunings of this recipe in their place")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found, the plans with it")
    parser.add_argument("--stage", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        run_in_this_process(*given.stage, whole=given.whole)
        return
    if given.recipe and not COUNTS_ANEW.exists():
        parser.error("--recipe counts a process's peak anew, which Linux alone does")
    chosen = [name for name in CONFIGURATIONS if fnmatch(name, given.only)]
    if not chosen:
        parser.error(f"--only {given.only!r} matches none of: {', '.join(CONFIGURATIONS)}")
    found: list[dict[str, Any]] = []
    print(f"{'configuration':34} {'phase':10} {'planned MB':>10} {'measured MB':>11} {'error %':>8}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        each = (compare(name, Path(folder)) for name in chosen)
        for one in compare_all(given.recipe, Path(folder)) if given.recipe else each:
            found.append(one)
            sizes = f"{one['predicted'] / 1e6:10.0f} {one['measured'] / 1e6:11.0f}"
            print(f"{one['name']:34} {one['phase']:10} {sizes} {100 * one['error']:+8.1f}", flush=True)
            if given.json:
                given.json.write_text(json.dumps(found, indent=1))
    errors = sorted(abs(one["error"]) for one in found if one["name"] != FITTED)
    if not errors:
        return
    middle, worst = 100 * errors[len(errors) // 2], 100 * errors[-1]
    within = sum(error <= 0.1 for error in errors)
    print(f"{within} of {len(errors)} within 10 %; median {middle:.1f} %, largest {worst:.1f} %")


if __name__ == "__main__":
    main()
