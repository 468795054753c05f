"""Tunings on disk: PEFT's two files where PEFT has the method, and `luthier.json` beside them.

`luthier.json` holds the method with its settings, the fingerprint of the base it was trained on and whether that was
quantized. The fingerprint is of the weights before quantization: a tuning loads on either.
Weights are safetensors only.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from luthier.errors import UserError
from luthier.files import write_whole
from luthier.models.base import BaseModel
from luthier.models.tensor_file import write_tensors
from luthier.tuning import METHODS
from luthier.tuning.method import Method, attach, detach, parameters
from luthier.tuning.peft import check_types, task_type

PEFT_TYPES = {kind.peft_type: kind for kind in METHODS.values() if hasattr(kind, "peft_type")}
WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "luthier.json"


@dataclass
class _Base:
    model: str
    fingerprint: str


@dataclass
class _Card:
    base: _Base
    settings: dict[str, Any]


_CARD = TypeAdapter(_Card)


def save_tuning(base: BaseModel, name: str, folder: Path, writes: bool = True) -> int:
    """Write an attached tuning's files into `folder`; return their bytes.

    Of a base that is divided over ranks all call this, and one `writes`. Raises UserError where the disk is full.
    """
    method: Method = base.methods[name]
    write_tensors(folder / WEIGHTS, method.to_file(base, name), {"format": "pt"}, writes)
    if not writes:
        return 0
    card = {
        "luthier": 1,
        "settings": asdict(method.saved()),  # type: ignore[call-overload]
        "base": {
            "model": base.spec.model,
            "family": base.family,
            "fingerprint": base.fingerprint(),
            "quantized": base.quantized,
        },
        "parameters": sum(parameter.numel() for parameter in parameters(base, name).values()),
    }
    texts = {CARD: card, CONFIG: method.peft_config(base, name)}
    files = [WEIGHTS, *(file for file, text in texts.items() if text)]
    for file in files[1:]:
        write_whole(folder / file, _json(texts[file]))
    return sum((folder / file).stat().st_size for file in files)


def load_tuning(base: BaseModel, folder: Path, name: str) -> None:
    """Attach the tuning saved in `folder` under `name`; a folder that PEFT wrote is read too.

    Raises UserError for a folder that is none, another base, a damaged file, and for missing, extra or
    misshapen tensors (all of them at once); the base is then as before.
    """
    if not (folder / CARD).is_file() and (folder / CONFIG).is_file():
        load_peft(base, folder, name)
        return
    card = _read_card(folder)
    here, there = base.fingerprint(), card["base"]["fingerprint"]
    if here != there:
        raise UserError(
            f"The tuning in {folder} was trained on {card['base']['model']} (fingerprint {there}); this base is "
            f"{base.spec.model} (fingerprint {here}). Load it on its own base."
        )
    kind = METHODS.get(str(card["settings"].get("method")))
    if kind is None or not hasattr(kind, "laws"):  # of those that train nothing, nothing is saved
        raise UserError(f"{folder / CARD} names the unknown method {card['settings'].get('method')!r}.")
    try:
        method: Any = TypeAdapter(kind).validate_python(card["settings"])
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise UserError(f"{folder / CARD} holds settings that {kind.__name__} does not have: {said}.") from None
    _attach_filled(base, folder, name, method)


def load_peft(base: BaseModel, folder: Path, name: str) -> None:
    """Attach the adapter that PEFT saved in `folder` under `name`.

    PEFT's files do not say which base they were trained on: what can be checked is task, names and shapes.
    Raises UserError as `load_tuning` does, and for an adapter that uses what Luthier does not have.
    """
    config = _read_json(folder / CONFIG)
    kind: Any = PEFT_TYPES.get(str(config.get("peft_type")))
    if kind is None:
        raise UserError(
            f"{folder / CONFIG} is of the type {config.get('peft_type')!r}; Luthier reads {', '.join(sorted(PEFT_TYPES))}."
        )
    if config.get("task_type") not in (None, task_type(base)):
        raise UserError(
            f"{folder / CONFIG} is for {config['task_type']}; this {base.family} base is {task_type(base)}."
        )
    try:
        check_types(config)
    except UserError as error:
        raise UserError(f"{folder / CONFIG} {error}") from None
    try:
        method: Any = kind.from_peft(base, config)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise UserError(f"{folder / CONFIG} is damaged: {error!r}.") from None
    _attach_filled(base, folder, name, method)


def _attach_filled(base: BaseModel, folder: Path, name: str, method: Any) -> None:
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
    wrong += [
        f"{key} holds {tensors[key].dtype}, no numbers to train".replace("torch.", "")
        for key in owned
        if key in tensors and not tensors[key].is_floating_point()
    ]
    if wrong:
        raise UserError(f"{where} does not fit the tuning it claims to be: {'; '.join(wrong)}.")
    with torch.no_grad():
        for key, parameter in owned.items():
            parameter.copy_(tensors[key])


def _read_card(folder: Path) -> dict[str, Any]:
    if not (folder / CARD).is_file():
        raise UserError(f"{folder} holds no tuning: neither {CARD} nor PEFT's {CONFIG} is there.")
    card = _read_json(folder / CARD)
    try:
        _CARD.validate_python(card)
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise UserError(f"{folder / CARD} is damaged: {said}.") from None
    return card


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no named keys.")
    return content


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        pickled = [one.name for ending in ("*.bin", "*.pt", "*.pth") for one in sorted(path.parent.glob(ending))]
        if pickled:
            raise UserError(
                f"{path} is not there, only {', '.join(pickled)}: pickled weights can run any code when they are read, so "
                "they are refused. Save the adapter again as safetensors."
            ) from None
        raise UserError(f"{path} is not there.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}.") from None


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
