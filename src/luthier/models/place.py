"""Where a base is read from, and what is said when it cannot be read."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from luthier.errors import UserError

# As safetensors and as configurations call them.
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPES |= {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Place:
    """Where a base is read from: transformers' source and options, and how errors call it."""

    source: str
    options: dict[str, Any]
    title: str
    gguf: str | None = None


@contextmanager
def explained(place: Place) -> Iterator[None]:
    """Turn what transformers raises for unreadable files into one message."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(
            f"The base model could not be read from the {place.title}: {' '.join(str(error).split())[:300]} "
            "A directory must hold config.json, model.safetensors and the tokenizer's files."
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' warnings and bars, which would break ours, off the terminal from here on."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    yield


def stored_dtype(place: Place, config: Any) -> torch.dtype:
    """The precision of most of the weights, from the header of one of their files; where none is here yet, the configuration's."""
    file = _here(place, "model.safetensors")
    if file is None and (index := _here(place, "model.safetensors.index.json")):
        file = _here(place, min(json.loads(index.read_text())["weight_map"].values()))
    sizes: Counter[str] = Counter()
    if file is not None:
        with safe_open(file, "pt") as found:
            for key in found.keys():  # noqa: SIM118 (it is no mapping)
                one = found.get_slice(key)
                sizes[one.get_dtype()] += math.prod(one.get_shape())
    stated = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return _DTYPES.get(max(sizes, key=lambda name: sizes[name], default=stated), torch.float32)


def _here(place: Place, name: str) -> Path | None:
    """A file of the base, where it stands on this machine."""
    if Path(place.source).is_dir():
        file = Path(place.source) / name
        return file if file.is_file() else None
    found = try_to_load_from_cache(place.source, name, revision=place.options.get("revision"))
    return Path(found) if isinstance(found, str) else None
