"""A base with a tuning folded in, as an ordinary transformers directory that needs nothing of Luthier."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.models.base import BaseModel
from luthier.models.fold import as_stored, folds
from luthier.models.place import quiet
from luthier.models.quantize import QuantizedLinear


@torch.no_grad()
def merged_weights(base: BaseModel, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every weight of the model with the tuning `name` folded in, by the architecture's own names.

    Sums are made in fp32 and rounded to `dtype` once; 4-bit weights are unpacked. A tied weight is one tensor under
    several names, unless the tuning moved one of them alone. Raises UserError where the tuning is in no weight.
    """
    base.use(name)  # whole weights of the tuning's own stand in the modules now
    weights: dict[str, Tensor] = {}
    shared: dict[int, Tensor] = {}
    for path, module in {"": base.model, **base.grafts.modules}.items():
        prefix = f"{path}." if path else ""
        for key, parameter in module.named_parameters(recurse=False):
            if isinstance(module, QuantizedLinear) and key == "weight":
                weights[prefix + key] = as_stored(module, module.dequantized()).to(dtype)
            else:
                weights[prefix + key] = shared.setdefault(id(parameter), parameter.detach().to(dtype))
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set and not isinstance(module, QuantizedLinear):
                weights[prefix + key] = buffer
    for fold in folds(base.grafts, name):
        weights[f"{fold.path}.weight"] = fold.weight.to(dtype)
        if fold.bias is not None:
            weights[f"{fold.path}.bias"] = fold.bias.to(dtype)
    return weights


def write_model(base: BaseModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Write config, weights (safetensors) and tokenizer into a folder, as transformers itself would."""
    paths = {module: f"{path}.weight" for path, module in base.grafts.modules.items()}
    ends = [getattr(end, "base", end) for end in (base.embedding, base.model.get_output_embeddings())]  # under a graft
    tied = weights[paths[ends[0]]] is weights[paths[ends[1]]]
    config: Any = copy.deepcopy(base.config)
    config.tie_word_embeddings = bool(config.tie_word_embeddings) and tied
    config._attn_implementation = None  # ours is registered by Luthier
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with quiet():
        with torch.device("meta"):
            model = type(base.model)(config)
        model.load_state_dict(weights, strict=True, assign=True)
        if config.tie_word_embeddings:
            model.tie_weights()
        model.generation_config = base.model.generation_config
        model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)


def requantize(base: BaseModel, folder: Path, target: Path, dtype: torch.dtype) -> None:
    """Write the model in `folder` to `target` with its linears in 4 bits, in bitsandbytes' format for transformers."""
    from transformers import BitsAndBytesConfig

    kind = type(base.model)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=base.spec.double_quantize,
        bnb_4bit_compute_dtype=dtype,
    )
    with quiet():
        model = kind.from_pretrained(folder, quantization_config=settings, dtype=dtype, device_map=str(base.device))
        model.save_pretrained(target)
        base.tokenizer.save_pretrained(target)
