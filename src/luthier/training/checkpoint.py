"""Checkpoints: one safetensors file, written whole or not at all, from which a run ends in the same bits."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from luthier.files import whole_file
from luthier.models.shard import is_divided, read_parts, whole

# Names in safetensors' format.
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8"}


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


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, writes: bool = True
) -> None:
    """Write tensors as a whole safetensors file, divided ones gathered: all ranks call this, and one `writes`."""
    if any(is_divided(tensor) for tensor in tensors.values()):
        with whole_file(path) if writes else nullcontext() as partial:
            _write_gathered(partial, tensors, metadata)
    elif writes:
        flat = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with whole_file(path) as partial:
            save_file(flat, partial, metadata=metadata)


def _write_gathered(path: Path | None, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> None:
    """The file that `save_file` would write, of which no rank ever holds more than one tensor; None: gather only."""
    header: dict[str, Any] = {"__metadata__": metadata or {}}
    order = sorted(tensors, key=lambda key: -tensors[key].element_size())  # so that every tensor is aligned
    start = 0
    for key in order:
        tensor = tensors[key]
        stop = start + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") if path else nullcontext() as file:
        if file:
            file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            gathered = whole(tensors[key].detach())
            if file:
                file.write(gathered.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


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
