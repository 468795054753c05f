"""Checkpoints: one safetensors file, written whole or not at all, from which a run ends in the same bits."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.models.shard import read_parts
from luthier.models.tensor_file import write_tensors


@dataclass
class Progress:
    """Where training stands, besides its tensors."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    best: float | None = None  # of what is watched, the more the better: a loss stands here with its sign turned
    best_step: int = 0
    without_gain: int = 0
    micro_batch_tokens: int = 0  # the budget in force, where memory asked for a smaller one
    loss_scale: float = 1.0  # of float16: see loss_scale.py
    good_steps: int = 0  # since it was halved last
    history: list[dict[str, Any]] = field(default_factory=list)
    stream: dict[str, Any] = field(default_factory=dict)  # where the training rows go on


def write_checkpoint(
    path: Path, progress: Progress, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], writes: bool = True
) -> None:
    """Write weights, optimizer state, random generators and position atomically.

    Tensors that are divided over ranks are written whole: all ranks call this, and one `writes`.
    """
    tensors = {f"weight.{key}": tensor for key, tensor in weights.items()}
    tensors |= {f"optimizer.{key}": tensor for key, tensor in optimizer.items()}
    tensors["generator.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["generator.cuda"] = torch.cuda.get_rng_state()
    write_tensors(path, tensors, {"progress": json.dumps(asdict(progress))}, writes)


def read_checkpoint(
    path: Path, owned: Mapping[str, Tensor] | None = None
) -> tuple[Progress, dict[str, Tensor], dict[str, Tensor]]:
    """Read progress, weights and optimizer state; set the random generators as they were.

    Of what is divided as in `owned` only this rank's part is read.
    """
    known = owned or {}
    metadata, tensors = read_parts(path, lambda key: known.get(key.removeprefix("weight.").rpartition("/")[2]))
    progress = Progress(**json.loads(metadata["progress"]))
    torch.set_rng_state(tensors["generator.cpu"])
    if torch.cuda.is_available() and "generator.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["generator.cuda"])
    return progress, _part(tensors, "weight."), _part(tensors, "optimizer.")


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
