"""Find a base model by name and read it: embedded, directory, .gguf file or hub id."""

import copy
import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from luthier.errors import UserError, nearest
from luthier.models.embedded import EMBEDDED, embedded_folder
from luthier.models.first_calls import call_once
from luthier.models.gguf import load_gguf
from luthier.models.place import Place, complete, explained
from luthier.models.quantize import Quantization
from luthier.models.stored import Stored, narrow, stored_dtype

Dtype = Literal["auto", "bfloat16", "float32", "float16"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}

# A model that states no limit of its own (T5 has relative positions) is used up to this many tokens.
DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class BaseSpec:
    """Which base model, in which precision, on which device.

    `model` is an embedded name, a directory, a .gguf file or a hub id. `dtype: auto` takes bfloat16
    where this machine multiplies it faster than float32. `chat: auto` uses the tokenizer's chat
    template where it has one. `quantize: nf4` keeps the linears in 4 bits, with `double_quantize` their scales in 8;
    every method that leaves them as they are trains on it.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    model: str = "smollm2-135m-instruct"
    dtype: Dtype = "auto"
    device: str = "auto"
    chat: bool | Literal["auto"] = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    quantize: Quantization | None = None
    double_quantize: bool = True


def resolve_device(device: str) -> torch.device:
    """`auto` is the first accelerator, else the CPU; a device that is not there is a UserError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"The device {device!r} cannot be used: {reason} Use `device: auto`, cpu or cuda.") from None
    return found


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes it faster than float32 (a probe of 50 ms on a CPU)."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _seconds(torch.bfloat16) < _seconds(torch.float32) else torch.float32


@cache
def _seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return best


def context_length(config: Any, default: int) -> int:
    """The longest row in tokens; `default` for a model without a limit of its own (T5 counts distances)."""
    if hasattr(config, "relative_attention_num_buckets"):
        return default
    limits = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions")]
    return next((limit for limit in limits if isinstance(limit, int)), default)


def read_tokenizer(spec: BaseSpec) -> tuple[Any, Any]:
    """Read (tokenizer, config) without the weights. Raises UserError as `read_model` does."""
    place = _locate(spec)
    with explained(place):
        config = AutoConfig.from_pretrained(place.source, **place.options)
        return AutoTokenizer.from_pretrained(place.source, **place.options), config


def read_skeleton(spec: BaseSpec, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Read (model, tokenizer) with the model's shape (in `dtype`) but no weights: for what must be known before the work."""
    place = _locate(spec)
    tokenizer, config = read_tokenizer(spec)
    with explained(place), torch.device("meta"):
        model = _architectures(config).from_config(
            config, trust_remote_code=spec.trust_remote_code, dtype=dtype or torch.float32
        )
    return model, tokenizer


def how_stored(spec: BaseSpec, dtype: torch.dtype) -> Stored:
    """How `read_model` would read the weights; opens configuration and headers alone."""
    place = _locate(spec)
    if place.gguf:
        return Stored(torch.float32)
    with explained(place):
        config = AutoConfig.from_pretrained(place.source, **place.options)
        found = stored_dtype(place, config)
        return Stored(found, _twin(config, found, dtype, spec) is not None)


def read_model(spec: BaseSpec, dtype: torch.dtype) -> tuple[Any, Any]:
    """Read (model, tokenizer) from wherever the spec points; weights from safetensors or GGUF only.

    Raises UserError for a name that is nothing, and for files that cannot be read.
    """
    call_once()
    place = _locate(spec)
    if place.gguf:
        return load_gguf(Path(place.source) / place.gguf, dtype)
    tokenizer, config = read_tokenizer(spec)
    with explained(place):
        twin = _twin(config, stored_dtype(place, config), dtype, spec)
        first = torch.float32 if twin is not None else dtype
        model, found = _architectures(config).from_pretrained(
            place.source, config=config, dtype=first, use_safetensors=True, output_loading_info=True, **place.options
        )
    complete(place, found["missing_keys"])
    if twin is not None:
        narrow(model, twin)
    return model, tokenizer


def _architectures(config: Any) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _twin(config: Any, found: torch.dtype, dtype: torch.dtype, spec: BaseSpec) -> Any:
    """The model without numbers, in the precisions in which its stored weights of 32 bits are to be; None where they are
    not to be cast one by one.
    """
    if found != torch.float32 or dtype.itemsize == 4 or hasattr(config, "quantization_config"):
        return None
    if spec.trust_remote_code and hasattr(config, "auto_map"):
        return None  # code of others may take the precision in which it is made for anything
    with torch.device("meta"):
        twin = _architectures(config).from_config(  # of a copy: it writes dtype into it
            copy.deepcopy(config), trust_remote_code=spec.trust_remote_code, dtype=dtype
        )
    kept = twin.state_dict()
    made_in_it = any(one.dtype == dtype for name, one in twin.named_buffers() if name not in kept)
    # Where some weights stay wide, or a buffer is computed in the precision (Gemma's scale), the model is transformers' own to cast.
    return None if made_in_it or twin._get_dtype_plan(dtype) else twin


def _locate(spec: BaseSpec) -> Place:
    name = spec.model
    path = embedded_folder(name) if name in EMBEDDED else Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"The base model file {path.absolute()} does not exist.")
        return Place(str(path.parent), {"gguf_file": path.name}, f"GGUF file {path}", path.name)
    if path.is_dir():
        return Place(str(path), {"trust_remote_code": spec.trust_remote_code}, f"directory {path}")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"Unknown base model {name!r}. {nearest(name, EMBEDDED)} A base is an embedded name "
            f"({', '.join(EMBEDDED)}), a directory, a .gguf file or a hub id (owner/name)."
        )
    offline = " (offline mode is on: HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
    options = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    return Place(name, options, f"hub id {name!r}{offline}")
