"""The precision in which weights are stored, and casting those of 32 bits to 16 without all of both in memory."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

from luthier.models.mapped import MappedFiles
from luthier.models.place import Place

# As safetensors calls them.
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Stored:
    """How a base's weights are read: their precision before they are in the base's, and whether they are cast one by one."""

    dtype: torch.dtype
    one_by_one: bool = False


def stored_dtype(place: Place, config: Any) -> torch.dtype:
    """The precision of most of the weights, from the header of one of their files; where none is here yet, the configuration's."""
    file = place.here("model.safetensors")
    if file is None and (index := place.here("model.safetensors.index.json")):
        file = place.here(min(json.loads(index.read_text())["weight_map"].values()))
    sizes: Counter[torch.dtype | None] = Counter()
    if file is not None:
        with safe_open(file, "pt") as found:
            for key in found.keys():  # noqa: SIM118 (it is no mapping)
                one = found.get_slice(key)
                sizes[_DTYPES.get(one.get_dtype())] += math.prod(one.get_shape())
    stated = getattr(config, "dtype", None) or torch.float32
    return max(sizes, key=lambda dtype: sizes[dtype], default=None) or stated


def narrow(model: Any, twin: Any) -> None:
    """Cast weights to the precision of their twins in a model without numbers, and let go of each one's pages of the mapped file."""
    files, wanted = MappedFiles(), twin.state_dict()
    for name, one in model.state_dict(keep_vars=True).items():
        if one.dtype != wanted[name].dtype:
            wide = one.data
            one.data = wide.to(wanted[name].dtype)
            files.let_go(wide)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    parts = [getattr(config, key) for config in configs for key in config.sub_configs]
    for config in (*configs, *parts):
        if config is not None:
            config.dtype = twin.dtype
