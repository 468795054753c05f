"""Switching tunings on one loaded base: the time of `use`, and that the bits are the same however often.

    python benchmarks/swap.py [--base NAME] [--quantize nf4] [--rounds 2000] [--json OUT.json]

Attaches LoRA, prompt tuning and (not in 4 bits) full fine-tuning to one base, switches between them and back, and prints
the time of a switch. `merged` also makes W + BA, so it takes the time of those sums once; leaving it is a switch.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from luthier.encoding.batches import collate
from luthier.encoding.encoder import Encoded
from luthier.models.base import BaseModel
from luthier.models.load import BaseSpec
from luthier.models.loss import label_scores
from luthier.tuning import Full, LoRA, Method, PromptTuning, attach, parameters


def seconds(what: Callable[[], None], rounds: int) -> float:
    """Median time of one call."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        what()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=BaseSpec().model)
    parser.add_argument("--quantize", choices=["nf4"])
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    base = BaseModel.load(BaseSpec(model=asked.base, quantize=asked.quantize))
    methods: dict[str, Method] = {"lora": LoRA(), "other": LoRA(rank=16), "prompt": PromptTuning()}
    if not asked.quantize:
        methods["full"] = Full()
    torch.manual_seed(0)
    for name, method in methods.items():
        attach(base, name, method)
        with torch.no_grad():
            for parameter in parameters(base, name).values():
                parameter.add_(torch.randn_like(parameter) * 0.01)
    row = Encoded("row", list(range(100, 140)), list(range(200, 216)))
    batch = collate([row], base.decoder_start if base.encoder_decoder else None).to(base.device)

    def answer(name: str | None) -> torch.Tensor:
        base.use(name)
        return label_scores(base, batch)[0]

    before = {name: answer(name) for name in [None, *methods]}
    table: dict[str, float] = {}
    for name in methods:

        def there_and_back(name: str = name) -> None:
            base.use(name)
            base.use(None)

        table[f"use({name!r}), use(None)"] = seconds(there_and_back, asked.rounds) / 2
    if not asked.quantize:
        table["use('lora', merged=True)"] = seconds(lambda: base.use("lora", merged=True), 5)
        leave = []
        for _ in range(5):
            base.use("lora", merged=True)
            leave.append(seconds(lambda: base.use(None), 1))
        table["use(None) after merged"] = statistics.median(leave)
    same = all(torch.equal(answer(name), before[name]) for name in [*methods, None])
    print(f"{base.spec.model}, {base.parameter_count:,} parameters, {'nf4' if base.quantized else base.dtype}")
    for what, value in table.items():
        print(f"  {what:28} {value * 1e6:12,.1f} us")
    print(f"  bits after {asked.rounds:,} switches each: {'the same' if same else 'NOT THE SAME'}")
    if asked.json:
        asked.json.write_text(json.dumps({"seconds": table, "same_bits": same}, indent=2) + "\n")


if __name__ == "__main__":
    main()
