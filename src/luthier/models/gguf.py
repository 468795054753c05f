"""A base in one .gguf file, dequantized while it is read."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from luthier.models.place import Place, complete, explained


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Read model and tokenizer from one .gguf file, dequantized to `dtype`."""
    place = Place(str(path.parent), {"gguf_file": path.name}, f"GGUF file {path}", path.name)
    with explained(place):
        tokenizer = AutoTokenizer.from_pretrained(place.source, **place.options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place.source,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            output_loading_info=True,
            **place.options,
        )
    model, found = loaded
    complete(place, found["missing_keys"])
    # The weights are plain now: a saved copy must not claim to be quantized.
    if getattr(model, "hf_quantizer", None) is not None:
        del model.hf_quantizer
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer
