"""The frozen cache: trained from rows, and from the states of what lies below the tuning.

    python benchmarks/frozen.py [--job third|decoder] [--rows 48] [--repeats 3] [--json OUT.json]

`third`: LoRA on the upper third of the default base. `decoder`: LoRA on q and v of the decoder of a model of flan-t5-small's
shape (random weights). Both sides train the same steps on the same rows, turn about; tokens a second of an epoch in which
the states are there. The bound is the ratio of the floating-point operations of the matrix products that each side's first step makes.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from training.jobs import write_t5
from training.profile import Products

from luthier.encoding.order import Shuffled, step_rows
from luthier.encoding.stored import stored_rows
from luthier.models.base import BaseModel
from luthier.models.embedded import embedded_folder
from luthier.models.load import BaseSpec
from luthier.recipe_file import make_recipe
from luthier.training.frozen_rows import frozen_rows
from luthier.training.loop import accumulate, train
from luthier.training.settings import TrainingSettings
from luthier.tuning import LoRA, attach, detach

SMOLLM2 = "smollm2-135m-instruct"
BATCH, VOCABULARY = 8, 49_152  # of the tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=["third", "decoder"], default="third")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(given, Path(folder))
    if given.json:
        given.json.write_text(json.dumps([result], indent=2) + "\n")


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both sides, turn about, and what the operations allow."""
    model = SMOLLM2
    if given.job == "decoder":
        model = str(folder / "t5")
        write_t5(folder / "t5", embedded_folder(SMOLLM2), VOCABULARY)
    recipe = make_recipe({
        "base": {"model": model}, "task": {**_task(), "train": {**_task()["train"], "limit": given.rows}},
        "tunings": ["lora"], "retention": [],
    })  # fmt: skip
    examples = recipe.examples(recipe.tasks[0])
    base = BaseModel.load(BaseSpec(model=model))
    rows = stored_rows(recipe.read_encoder(), examples.train, examples.train.key)  # type: ignore[attr-defined]
    method = LoRA(layers=list(range(2 * base.blocks // 3, base.blocks)))
    if given.job == "decoder":
        method = LoRA(targets=[r"decoder\..*\.(q|v)"])
    settings = TrainingSettings(epochs=1, batch_size=BATCH, learning_rate=1e-3, warmup=0.0)
    rates: dict[str, list[float]] = {"rows": [], "states": []}
    losses: dict[str, float] = {}
    operations: dict[str, int] = {}
    started = time.perf_counter()
    for _ in range(given.repeats):
        for side in rates:
            attach(base, "t", method, 0)
            used = rows if side == "rows" else frozen_rows(base, "t", rows, print)
            if side not in operations:
                base.use("t")
                with Products() as products:
                    accumulate(
                        base,
                        step_rows(Shuffled(used, 0), BATCH, 0),
                        settings.token_budget(base.device.type, base.blocks * base.width),
                    )
                operations[side] = products.flops
                detach(base, "t")
                attach(base, "t", method, 0)
            with tempfile.TemporaryDirectory() as out:
                done = train(base, "t", Shuffled(used, 0), settings, 0, Path(out))
            detach(base, "t")
            rates[side].append(done.tokens / done.seconds)
            losses[side] = done.history[-1]["loss"]
            print(f"{side:7} {rates[side][-1]:6.0f} tokens/s, last loss {losses[side]:.4f}", flush=True)
    middle = {side: statistics.median(each) for side, each in rates.items()}
    ratio, bound = middle["states"] / middle["rows"], operations["rows"] / operations["states"]
    print(
        f"from states {ratio:.2f} times as fast; operations allow {bound:.2f}: {ratio / bound:.0%} of that "
        f"({time.perf_counter() - started:.0f} s in all)"
    )
    return {
        "job": f"frozen cache, {given.job}", "peer": "from rows", "peer_value": middle["rows"], "ours": middle["states"],
        "speed_ratio": ratio, "bound": bound, "loss_peer": losses["rows"], "loss_ours": losses["states"],
    }  # fmt: skip


def _task() -> dict:
    import yaml

    from luthier.data.library import task_files

    task: dict = yaml.safe_load(task_files()["support-dialogues"].read_text())
    train = task["train"] if isinstance(task["train"], dict) else {"path": task["train"]}
    return {"name": "support-dialogues", **task, "train": train}


if __name__ == "__main__":
    main()
