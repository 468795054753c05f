"""Learning rates that differ between a tuning's parameters: by pattern, by depth, and LoRA+'s for B.

    rate(key) = rate x rates[pattern that matches key] x layer_decay ** (blocks above the key's) x lora_plus (for B)

Layer-wise decay: Howard and Ruder 2018 (https://arxiv.org/abs/1801.06146); LoRA+: Hayou et al. 2024
(https://arxiv.org/abs/2402.12354).
"""

import fnmatch
import re
from collections.abc import Iterable

from luthier.errors import UserError, nearest
from luthier.training.settings import TrainingSettings

_BLOCK = re.compile(r"\.(\d+)\.")


def rate_factors(keys: Iterable[str], settings: TrainingSettings, blocks: int) -> dict[str, float]:
    """The factor of each parameter's learning rate; `blocks` is the number of the model's blocks.

    Raises UserError for a pattern that matches no parameter, and for `lora_plus` where there is no B.
    """
    every = list(keys)
    factors = {key: settings.layer_decay ** _above(key, blocks) for key in every}
    for pattern, factor in settings.rates.items():
        found = [key for key in every if fnmatch.fnmatchcase(key, pattern)]
        if not found:
            raise UserError(
                f"training.rates: the pattern {pattern!r} matches none of the {len(every)} parameters that are trained. "
                f"{nearest(pattern, every[:50])}"
            )
        for key in found:
            factors[key] *= factor
    if settings.lora_plus is not None:
        theirs = [key for key in every if "lora_B" in key or "lora_embedding_B" in key]
        if not theirs:
            raise UserError("training.lora_plus raises the learning rate of LoRA's B; this tuning has none. Remove it.")
        for key in theirs:
            factors[key] *= settings.lora_plus
    return factors


def _above(key: str, blocks: int) -> int:
    """Blocks between a parameter and the output: none for the head and the last norm, all for the embeddings."""
    if found := _BLOCK.search(key):
        return blocks - 1 - int(found[1])
    return blocks if "embed" in key or ".wte" in key or ".wpe" in key or "shared" in key else 0
