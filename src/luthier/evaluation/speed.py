"""What using a tuning costs: one request at a time, with its additions beside the weights and folded into them."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from luthier.errors import UserError
from luthier.models.base import BaseModel
from luthier.models.generate import generate
from luthier.tuning import parameters

NEW_TOKENS = 17
REPEATS = 3


@dataclass(frozen=True)
class Speed:
    """Seconds until the first token of an answer, and tokens a second after it; the least seconds of a few repeats."""

    first_token_seconds: float
    tokens_per_second: float


def inference_cost(base: BaseModel, prompts: Sequence[Sequence[int]], name: str | None) -> dict[str, Any]:
    """The cost of one request with the active tuning `name`: the prompt of middle length, 17 new tokens whatever they are.

    `merged` is the same with the tuning folded into the weights; None where it cannot be (soft prompts, 4-bit bases) or there
    is none. `weights_bytes` are those of the base and the tuning in memory. The tuning is active as before afterwards.
    """
    prompt = sorted(prompts, key=len)[len(prompts) // 2]
    cost: dict[str, Any] = {
        "prompt_tokens": len(prompt),
        **asdict(_speed(base, prompt)),
        "weights_bytes": _weights_bytes(base, name),
        "merged": None,
    }
    if name is not None:
        try:
            base.use(name, merged=True)
            cost["merged"] = asdict(_speed(base, prompt))
        except UserError:
            pass  # what it adds is in no weight
        finally:
            base.use(name)
    return cost


def _speed(base: BaseModel, prompt: Sequence[int]) -> Speed:
    _seconds(base, prompt, 2)  # what is done once only
    first = min(_seconds(base, prompt, 1) for _ in range(REPEATS))
    whole = min(_seconds(base, prompt, NEW_TOKENS) for _ in range(REPEATS))
    return Speed(first, (NEW_TOKENS - 1) / max(whole - first, 1e-9))


def _seconds(base: BaseModel, prompt: Sequence[int], tokens: int) -> float:
    _wait(base)
    started = time.perf_counter()
    generate(base, [prompt], tokens, stop=[])
    _wait(base)
    return time.perf_counter() - started


def _wait(base: BaseModel) -> None:
    """Let an accelerator finish what it was given."""
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)


def _weights_bytes(base: BaseModel, name: str | None) -> int:
    held = [*base.model.parameters(), *base.model.buffers(), *(parameters(base, name).values() if name else ())]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in held}.values())
