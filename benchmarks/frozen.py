"""The frozen cache: a LoRA on the upper third of the default base, trained from rows and from the states below it.

    python benchmarks/frozen.py [--rows 48] [--repeats 3] [--json OUT.json]

Both sides train the same steps on the same rows, turn about; tokens a second of an epoch in which the states are there.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from luthier.encoding.order import Shuffled
from luthier.encoding.stored import stored_rows
from luthier.models.base import BaseModel
from luthier.models.load import BaseSpec
from luthier.recipe_file import make_recipe
from luthier.training.frozen_rows import frozen_rows
from luthier.training.loop import train
from luthier.training.settings import TrainingSettings
from luthier.tuning import LoRA, attach, detach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    recipe = make_recipe({"task": {**_task(), "train": {**_task()["train"], "limit": given.rows}}, "tunings": ["lora"], "retention": []})  # fmt: skip
    examples = recipe.examples(recipe.tasks[0])
    base = BaseModel.load(BaseSpec())
    rows = stored_rows(recipe.read_encoder(), examples.train, examples.train.key)  # type: ignore[attr-defined]
    method = LoRA(layers=list(range(2 * base.blocks // 3, base.blocks)))
    settings = TrainingSettings(epochs=1, learning_rate=1e-3, warmup=0.0)
    rates: dict[str, list[float]] = {"rows": [], "states": []}
    losses: dict[str, float] = {}
    started = time.perf_counter()
    for _ in range(given.repeats):
        for side in rates:
            attach(base, "t", method, 0)
            used = rows if side == "rows" else frozen_rows(base, "t", rows, print)
            with tempfile.TemporaryDirectory() as folder:
                done = train(base, "t", Shuffled(used, 0), settings, 0, Path(folder))
            detach(base, "t")
            rates[side].append(done.tokens / done.seconds)
            losses[side] = done.history[-1]["loss"]
            print(f"{side:7} {rates[side][-1]:6.0f} tokens/s, last loss {losses[side]:.4f}", flush=True)
    middle = {side: statistics.median(each) for side, each in rates.items()}
    print(
        f"from states {middle['states'] / middle['rows']:.2f} times as fast ({time.perf_counter() - started:.0f} s in all)"
    )
    result = {"job": "LoRA on the upper third", "peer": "from rows", "peer_value": middle["rows"], "ours": middle["states"],
              "speed_ratio": middle["states"] / middle["rows"], "loss_peer": losses["rows"], "loss_ours": losses["states"]}  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps([result], indent=2) + "\n")


def _task() -> dict:
    import yaml

    from luthier.data.library import task_files

    task: dict = yaml.safe_load(task_files()["support-dialogues"].read_text())
    train = task["train"] if isinstance(task["train"], dict) else {"path": task["train"]}
    return {"name": "support-dialogues", **task, "train": train}


if __name__ == "__main__":
    main()
