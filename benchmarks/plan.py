"""The plan against the real thing: `luthier plan` before, the peak of each stage's own process after.

    python benchmarks/plan.py [--only PATTERN] [--json OUT.json]

Each line is one tuning of one recipe: `luthier plan RECIPE --json` in one process, `luthier run RECIPE` in others, so that
the peak is of a fresh process that trained and validated this tuning alone. What is compared is the peak without what was there
after the imports. Bases are random weights of real widths with four blocks, made here, and the default base.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

# name -> base, changes of the base, of the recipe, of the training, the tuning.
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama lora": ("llama", {}, {}, {}, {"method": "lora", "rank": 16}),
    "llama lora checkpointing": ("llama", {}, {}, {"gradient_checkpointing": True}, {"method": "lora"}),
    "llama lora batch 16 budget 2048": ("llama", {}, {}, {"batch_size": 16, "micro_batch_tokens": 2048}, {"method": "lora"}),
    "llama lora budget 256": ("llama", {}, {}, {"micro_batch_tokens": 256}, {"method": "lora"}),
    "llama lora nf4": ("llama", {"quantize": "nf4"}, {}, {}, {"method": "lora"}),
    "llama lora bf16": ("llama", {"dtype": "bfloat16"}, {}, {"batch_size": 4}, {"method": "lora"}),
    "llama full": ("llama", {}, {}, {}, {"method": "full"}),
    "llama full adafactor": ("llama", {}, {}, {"optimizer": "adafactor"}, {"method": "full"}),
    "llama full bf16": ("llama", {"dtype": "bfloat16"}, {}, {"batch_size": 4}, {"method": "full"}),
    "llama prompt tuning": ("llama", {}, {}, {}, {"method": "prompt_tuning"}),
    "llama prefix tuning": ("llama", {}, {}, {}, {"method": "prefix_tuning"}),
    "llama zero-shot": ("llama", {}, {}, {}, {"method": "zero_shot"}),
    "gpt2 lora": ("gpt2", {}, {}, {}, {"method": "lora"}),
    "gpt2 ia3 length 512": ("gpt2", {}, {"max_length": 512, "words": 600}, {"micro_batch_tokens": 2048}, {"method": "ia3"}),
    "gpt2 selective": ("gpt2", {}, {}, {}, {"method": "selective"}),
    "gpt2 full checkpointing": ("gpt2", {}, {}, {"gradient_checkpointing": True}, {"method": "full"}),
    "qwen2 bottleneck": ("qwen2", {}, {}, {}, {"method": "bottleneck"}),
    "qwen2 lora length 512": ("qwen2", {}, {"max_length": 512, "words": 600}, {"micro_batch_tokens": 2048}, {"method": "lora"}),
    "qwen2 full budget 512": ("qwen2", {}, {}, {"micro_batch_tokens": 512}, {"method": "full"}),
    "t5 lora": ("t5", {}, {}, {}, {"method": "lora"}),
    "t5 full": ("t5", {}, {}, {}, {"method": "full"}),
    "t5 lora batch 16 budget 2048": ("t5", {}, {}, {"batch_size": 16, "micro_batch_tokens": 2048}, {"method": "lora"}),
    "t5 prompt tuning checkpointing": ("t5", {}, {}, {"gradient_checkpointing": True}, {"method": "prompt_tuning"}),
    "smollm2 lora": ("smollm2-135m-instruct", {}, {}, {"max_steps": 2}, {"method": "lora"}),
    "smollm2 lora nf4": ("smollm2-135m-instruct", {"quantize": "nf4"}, {}, {"max_steps": 2}, {"method": "lora"}),
    "smollm2 full checkpointing": ("smollm2-135m-instruct", {}, {}, {"max_steps": 2, "gradient_checkpointing": True}, {"method": "full"}),
}  # fmt: skip


def make_base(family: str, folder: Path) -> str:
    """A base of this family with random weights, and the default base's tokenizer."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
        GPT2Config,
        LlamaConfig,
        Qwen2Config,
        T5Config,
    )

    from luthier.models.embedded import EMBEDDED, embedded_folder

    if family in EMBEDDED:
        return family
    target = folder / family
    if target.is_dir():
        return str(target)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder("smollm2-135m-instruct"))
    shared = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    wide = shared | {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 4, "num_attention_heads": 12}
    config: Any = {
        "llama": lambda: LlamaConfig(**wide, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True),
        "qwen2": lambda: Qwen2Config(**wide, num_key_value_heads=2, max_position_embeddings=2048),
        "gpt2": lambda: GPT2Config(**shared, n_embd=768, n_layer=4, n_head=12, n_positions=2048),
        "t5": lambda: T5Config(**shared, d_model=512, d_ff=1280, num_layers=4, num_heads=8, decoder_start_token_id=2,
                               feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    }[family]()  # fmt: skip
    made: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    made.from_config(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)


def make_rows(folder: Path, words: int) -> Path:
    """60 rows of up to so many words, with answers of a quarter of that."""
    file = folder / f"rows-{words}.jsonl"
    draw = random.Random(0)
    vocabulary = [
        "the",
        "guest",
        "asks",
        "clerk",
        "for",
        "a",
        "quiet",
        "room",
        "and",
        "pays",
        "two",
        "nights",
        "with",
        "card",
        "in",
        "hand",
    ]
    text = lambda most: " ".join(draw.choices(vocabulary, k=draw.randint(most // 3, most)))  # noqa: E731
    file.write_text("".join(json.dumps({"text": text(words), "answer": text(words // 4)}) + "\n" for _ in range(60)))
    return file


def compare(name: str, folder: Path) -> dict[str, Any]:
    """Plan one configuration, run it, and return both in bytes."""
    base, of_base, of_recipe, of_training, tuning = CONFIGURATIONS[name]
    of_recipe = dict(of_recipe)
    rows = make_rows(folder, of_recipe.pop("words", 150))
    task = {"name": "rows", "template": "{{ text }} ||| {{ answer }}", "train": rows.name, "validation": 4, "test": 2}
    recipe = {
        "base": {"model": make_base(base, folder), "dtype": "float32", **of_base},
        "task": task | {"max_new_tokens": 1}, "data": str(folder), "retention": [], "allow": ["duplicate", "leak"],
        "training": {"max_steps": 3, "batch_size": 8, **of_training}, "tunings": {"t": tuning}, **of_recipe,
    }  # fmt: skip
    file, out = folder / "recipe.yaml", Path(tempfile.mkdtemp(dir=folder)) / "run"
    file.write_text(json.dumps(recipe))
    luthier = [sys.executable, "-m", "luthier"]
    plan = json.loads(subprocess.run([*luthier, "plan", str(file), "--json"], check=True, stdout=-1).stdout)["t"]
    subprocess.run([*luthier, "run", str(file), "--out", str(out)], check=True, stdout=-3)
    result = json.loads((out / "results" / "t.json").read_text())
    measured = result["peak_memory_bytes"] - result["memory_after_import_bytes"]
    predicted = max(held for phase, held in plan["phases"].items() if phase != "answering")
    return {"name": name, "predicted": predicted, "measured": measured, "error": predicted / measured - 1, "plan": plan}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in CONFIGURATIONS:
            if fnmatch(name, given.only):
                one = compare(name, Path(folder))
                found.append(one)
                print(
                    f"{name:34} predicted {one['predicted'] / 1e6:7.0f} MB  measured {one['measured'] / 1e6:7.0f} MB  "
                    f"{100 * one['error']:+6.1f} %",
                    flush=True,
                )
                if given.json:
                    given.json.write_text(json.dumps(found, indent=1))
    errors = sorted(abs(one["error"]) for one in found)
    within = sum(error <= 0.1 for error in errors)
    print(
        f"{within} of {len(errors)} within 10 %; median {100 * errors[len(errors) // 2]:.1f} %, worst {100 * errors[-1]:.1f} %"
    )


if __name__ == "__main__":
    main()
