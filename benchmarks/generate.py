"""Answers with a LoRA attached: Luthier against transformers' `generate` with PEFT, the same prompts, adapter and new tokens.

    python benchmarks/generate.py [--job decoder|t5] [--data FOLDER_WITH_DIALOGSUM] [--prompts 96] [--new-tokens 64]
                                  [--repeats 3] [--dtype auto] [--json OUT.json]

`decoder` is the default base, `t5` a model of flan-t5-small's shape with random weights, which does not end by itself.

Each measurement is a process of its own; the clock runs while answers are written. Peers decode batches of 32, padded on the
left, in the order given ("as installed") and sorted by length ("sorted"). The adapter is a fresh LoRA of rank 8 on all linears,
moved at random by so little that answers still end by themselves; PEFT reads the same file. A row's new tokens count up to
its end token, for every side alike. In float32 the tokens of both sides are compared.
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

from training.jobs import T5_END, folded, write_t5

SMOLLM2 = "smollm2-135m-instruct"
BATCH, SEED = 32, 0
SIDES = ("luthier", "transformers", "transformers, sorted")


def prompts_of(folder: Path | None, count: int, t5: bool) -> tuple[list[list[int]], list[int]]:
    """Prompt ids, and the tokens that end an answer."""
    from luthier.data.source import Source
    from luthier.data.task import Task
    from luthier.recipe_file import make_recipe

    recipe = make_recipe({"task": "support-dialogues", "tunings": ["zero_shot"], "retention": []})
    task: Any = recipe.task
    if folder is not None:
        task = Task(
            template="Summarize the following conversation.\n\n{{ dialogue }} ||| {{ summary1 }}",
            test=Source(str(folder / "dialogsum.test.jsonl"), limit=count),
        )
    found = recipe.examples(task)
    encoder = recipe.read_encoder()
    rows = [*found.test, *found.train][:count]
    prompts = [encoder.prompt_ids(one) for one in rows]
    return ([folded(one) for one in prompts], [T5_END]) if t5 else (prompts, list(encoder.stops))


def model_of(job: str, folder: Path) -> str:
    """The base of a job; a T5 is written once."""
    from luthier.models.embedded import embedded_folder

    if job == "t5" and not (folder / "t5").is_dir():
        write_t5(folder / "t5", embedded_folder(SMOLLM2))
    return str(folder / "t5") if job == "t5" else str(embedded_folder(SMOLLM2))


def write_adapter(folder: Path, dtype: str, model: str) -> None:
    """A LoRA that changes the base a little, as PEFT's two files."""
    import torch

    from luthier.models.base import BaseModel
    from luthier.models.load import BaseSpec
    from luthier.tuning import LoRA, attach, parameters
    from luthier.tuning.files import save_tuning

    base = BaseModel.load(BaseSpec(model=model, dtype=dtype))  # type: ignore[arg-type]
    attach(base, "lora", LoRA(rank=8), SEED)
    draw = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in parameters(base, "lora").values():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 1e-3)
    save_tuning(base, "lora", folder)


def ours(prompts: list[list[int]], stops: list[int], new_tokens: int, adapter: Path, dtype: str, model: str) -> Any:
    from luthier.models.base import BaseModel
    from luthier.models.decoding import Decoding
    from luthier.models.generate import generate
    from luthier.models.load import BaseSpec
    from luthier.tuning.files import load_tuning

    base = BaseModel.load(BaseSpec(model=model, dtype=dtype))  # type: ignore[arg-type]
    load_tuning(base, adapter, "lora")
    base.use("lora")
    return lambda: generate(base, prompts, new_tokens, stops, decoding=Decoding(batch_size=BATCH))


def theirs(
    prompts: list[list[int]], stops: list[int], new_tokens: int, adapter: Path, dtype: str, path: str, by_length: bool
) -> Any:
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    t5 = AutoConfig.from_pretrained(path).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if t5 else AutoModelForCausalLM
    model = kind.from_pretrained(path, dtype=getattr(torch, dtype))
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]) if by_length else i)

    def run() -> list[list[int]]:
        results: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            longest = max(len(prompts[i]) for i in rows)
            padding = [[0] * (longest - len(prompts[i])) for i in rows]
            pairs = [(prompts[i], [1] * len(prompts[i])) for i in rows]
            laid = [
                (p + fill, m + fill) if t5 else (fill + p, fill + m)
                for (p, m), fill in zip(pairs, padding, strict=True)
            ]
            ids, mask = (torch.tensor(each) for each in zip(*laid, strict=True))
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False,
                    eos_token_id=stops, pad_token_id=stops[0],
                )[:, 1 if t5 else longest :].tolist()  # fmt: skip
            for i, written in zip(rows, out, strict=True):
                end = next((place for place, token in enumerate(written) if token in stops), len(written))
                results[i] = written[:end]
        return results

    return run


def measure(given: argparse.Namespace, side: str, adapter: Path, model: str) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--run", side, "--adapter", str(adapter), "--dtype", given.dtype]
    command += [
        "--job",
        given.job,
        "--model",
        model,
        "--prompts",
        str(given.prompts),
        "--new-tokens",
        str(given.new_tokens),
    ]
    command += ["--data", str(given.data)] if given.data else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{side:22} {found['rate']:6.1f} new tokens/s  {found['peak_bytes'] / 1e9:4.1f} GB", flush=True)
    return found


def compare(given: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(given.job, Path(folder))
        write_adapter(Path(folder), given.dtype, model)
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(given.repeats):
            for side in SIDES:
                runs[side].append(measure(given, side, Path(folder), model))
    middle = {
        side: {key: statistics.median(run[key] for run in found) for key in ("rate", "peak_bytes")}
        for side, found in runs.items()
    }
    mine, results = middle["luthier"], []
    for side in SIDES[1:]:
        pairs = list(zip(runs["luthier"][0]["answers"], runs[side][0]["answers"], strict=True))
        results.append(
            {
                "job": f"generate, {given.job}", "dtype": given.dtype, "peer": side, "peer_value": middle[side]["rate"],
                "ours": mine["rate"], "speed_ratio": mine["rate"] / middle[side]["rate"],
                "memory_ratio": mine["peak_bytes"] / middle[side]["peak_bytes"],
                "rows": len(pairs), "identical_rows": sum(a == b for a, b in pairs),
            }
        )  # fmt: skip
        one = results[-1]
        print(
            f"{side}: {one['peer_value']:.1f} new tokens/s, luthier {one['ours']:.1f}: {one['speed_ratio']:.2f} x as fast, "
            f"{one['memory_ratio']:.2f} of the memory; {one['identical_rows']} of {one['rows']} answers identical"
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=["decoder", "t5"], default="decoder")
    parser.add_argument(
        "--data", type=Path, help="a folder with dialogsum.test.jsonl; default: what ships with Luthier"
    )
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--adapter", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        prompts, stops = prompts_of(given.data, given.prompts, given.job == "t5")
        common = (prompts, stops, given.new_tokens, given.adapter, given.dtype, given.model)
        answer = ours(*common) if given.run == "luthier" else theirs(*common, by_length="sorted" in given.run)
        started = time.perf_counter()
        answers = answer()
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"rate": sum(map(len, answers)) / seconds, "peak_bytes": peak, "answers": answers}))
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
