"""PEFT's conventions: what its adapter_config.json says, and which modules it means.

PEFT itself is never imported; files written here are opened by it in a test, and its files here.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from luthier.errors import UserError
from luthier.models.base import BaseModel
from luthier.models.parts import head
from luthier.tuning.targets import LINEAR

PREFIX = "base_model.model."

# Keys that say nothing about the output of a finished adapter.
NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}

# What the keys hold that decide which modules an adapter means and what is computed there.
_NAMES = str | list[str] | None
_KINDS: dict[str, Any] = {
    "r": int,
    "lora_alpha": float,
    "lora_dropout": float,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "use_rslora": bool | None,
    "use_dora": bool | None,
    "modules_to_save": list[str] | None,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "feedforward_modules": _NAMES,
    "layers_pattern": _NAMES,
    "layers_to_transform": int | list[int] | None,
    "num_virtual_tokens": int,
}
_TYPES = {key: TypeAdapter(kind, config=ConfigDict(strict=True)) for key, kind in _KINDS.items()}


def check_types(config: Mapping[str, Any]) -> None:
    """Raise a UserError that names every key of an adapter_config.json that holds another kind of value than PEFT's."""
    wrong = []
    for key, kind in _TYPES.items():
        if key in config:
            try:
                kind.validate_python(config[key])
            except ValidationError as error:
                wrong.append(f"{key} is {config[key]!r} ({error.errors()[0]['msg'].lower()})")
    if wrong:
        raise UserError(f"is damaged: {'; '.join(wrong)}.")


def task_type(base: BaseModel) -> str:
    """PEFT's word for what the base does."""
    return "SEQ_2_SEQ_LM" if base.encoder_decoder else "CAUSAL_LM"


def header(base: BaseModel, peft_type: str) -> dict[str, Any]:
    """The keys that every adapter_config.json has."""
    return {
        "peft_type": peft_type,
        "task_type": task_type(base),
        "base_model_name_or_path": base.spec.model,
        "inference_mode": True,
    }


def refuse_others(config: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise a UserError that names every setting in use that is not among the known ones."""
    others = sorted(key for key, value in config.items() if value and key not in NEUTRAL and key not in known)
    if others:
        said = ", ".join(f"{key}: {config[key]!r}" for key in others)
        raise UserError(f"this {config['peft_type']} adapter uses what Luthier does not have: {said}.")


def chosen_modules(
    base: BaseModel, config: Mapping[str, Any], kinds: tuple[type[nn.Module], ...], key: str = "target_modules"
) -> list[str]:
    """The paths that PEFT's target keys mean: a list holds ends of paths, a text is a regular expression."""
    candidates = [path for path, module in base.grafts.modules.items() if isinstance(module, kinds)]
    patterns = config.get(key)
    if patterns == "all-linear":
        outside = head(base)
        linear = [path for path in candidates if isinstance(base.grafts.modules[path], LINEAR)]
        chosen = [path for path in linear if path not in outside]
    else:
        chosen = [path for path in candidates if _means(patterns, path)]
    if excluded := config.get("exclude_modules"):
        chosen = [path for path in chosen if not _means(excluded, path)]
    if (blocks := config.get("layers_to_transform")) not in (None, []):
        wanted = [blocks] if isinstance(blocks, int) else list(blocks)
        stacks = config.get("layers_pattern") or [r"[^.]*"]
        stack = "|".join([stacks] if isinstance(stacks, str) else stacks)
        found = {path: re.match(rf"(?:^|.*?\.)(?:{stack})\.(\d+)\.", path) for path in chosen}
        chosen = [path for path, match in found.items() if match and int(match[1]) in wanted]
    if not chosen:
        raise UserError(f"its {key} {patterns!r} means no module of this {base.family} model.")
    return chosen


def _means(patterns: Any, path: str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(path == one or path.endswith(f".{one}") for one in patterns or ())
