"""Tunings on disk: PEFT's two files where PEFT has the method, and `luthier.json` beside them.

`luthier.json` holds the method with its settings, the fingerprint of the base it was trained on and whether that was
quantized. The fingerprint is of the weights before quantization: a tuning loads on either.
Weights are safetensors only.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from luthier.errors import UserError
from luthier.models.base import BaseModel
from luthier.tuning import METHODS
from luthier.tuning.method import Method, attach, detach, parameters

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "luthier.json"


def pack(base: BaseModel, name: str) -> dict[str, bytes]:
    """The files of an attached tuning, by name, as bytes."""
    method: Method = base.methods[name]
    owned = {key: parameter.detach().cpu().contiguous() for key, parameter in parameters(base, name).items()}
    card = {
        "luthier": 1,
        "settings": asdict(method),  # type: ignore[call-overload]
        "base": {
            "model": base.spec.model,
            "family": base.family,
            "fingerprint": base.fingerprint(),
            "quantized": base.quantized,
        },
        "parameters": sum(tensor.numel() for tensor in owned.values()),
    }
    files = {
        WEIGHTS: save(method.to_file(base, owned), metadata={"format": "pt"}),
        CARD: _json(card),
    }
    if config := method.peft_config(base, name):
        files[CONFIG] = _json(config)
    return files


def load_tuning(base: BaseModel, folder: Path, name: str) -> None:
    """Attach the tuning saved in `folder` under `name`.

    Raises UserError for a folder that is none, another base, a damaged file, and for missing, extra or
    misshapen tensors (all of them at once); the base is then as before.
    """
    card = _read_card(folder)
    here, there = base.fingerprint(), card["base"]["fingerprint"]
    if here != there:
        raise UserError(
            f"The tuning in {folder} was trained on {card['base']['model']} (fingerprint {there}); this base is "
            f"{base.spec.model} (fingerprint {here}). Load it on its own base."
        )
    kind = METHODS.get(card["settings"].get("method"))
    if kind is None:
        raise UserError(f"{folder / CARD} names the unknown method {card['settings'].get('method')!r}.")
    method: Any = TypeAdapter(kind).validate_python(card["settings"])
    tensors = method.from_file(base, _read_weights(folder / WEIGHTS))
    attach(base, name, method)
    try:
        copy_into(parameters(base, name), tensors, str(folder / WEIGHTS))
    except BaseException:
        detach(base, name)
        raise


def copy_into(owned: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copy saved tensors into a tuning's parameters; every bad key is named in one UserError."""
    wrong = [f"missing {key}" for key in owned if key not in tensors]
    wrong += [f"unexpected {key}" for key in tensors if key not in owned]
    wrong += [
        f"{key} has shape {tuple(tensors[key].shape)}, not {tuple(parameter.shape)}"
        for key, parameter in owned.items()
        if key in tensors and tensors[key].shape != parameter.shape
    ]
    if wrong:
        raise UserError(f"{where} does not fit the tuning it claims to be: {'; '.join(wrong)}.")
    with torch.no_grad():
        for key, parameter in owned.items():
            parameter.copy_(tensors[key])


def _read_card(folder: Path) -> dict[str, Any]:
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        _ = card["base"]["fingerprint"], card["base"]["model"], card["settings"]["method"]
    except FileNotFoundError:
        raise UserError(f"{folder} holds no tuning: {CARD} is not there.") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CARD} is damaged: {error}.") from None
    return card


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is not there.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}.") from None


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
