"""safetensors files, written one tensor after another: no copy of the whole is ever in memory."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.files import whole_file
from luthier.models.shard import whole

# Names in safetensors' format.
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, writes: bool = True
) -> None:
    """Write tensors as a whole safetensors file; the same tensors give the same bytes.

    Divided ones are gathered: all ranks call this, and one `writes`.
    """
    with whole_file(path) if writes else nullcontext() as partial:
        stream(partial, tensors, metadata)


def stream(path: Path | None, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    """Write a file of tensors; None: gather only."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # so that every tensor is aligned
    start = 0
    for key in order:
        tensor = tensors[key]
        stop = start + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
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
