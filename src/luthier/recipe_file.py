"""Recipes as they are written: read from YAML, changed by --set, their mistakes told as the user wrote them."""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from luthier.data.mixture import Member, Mixture
from luthier.data.replay import Replay
from luthier.data.source import Source
from luthier.data.task import Task
from luthier.errors import UserError, nearest
from luthier.models.decoding import Decoding
from luthier.models.load import BaseSpec
from luthier.recipe import Recipe
from luthier.shorthand import expand
from luthier.training.settings import TrainingSettings
from luthier.tuning import METHODS

# What pydantic puts behind the path of a value that may be of several types, for each of them; and its names for keys that are none.
TYPE = re.compile(r"bool|int|float|str|(list|dict|literal)\[.*\]")
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `key.key=value` changes.

    Raises UserError for an unreadable file and for every unknown key or wrong value, all at once.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"The recipe {path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The recipe {path} could not be read: {error}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"The recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"The recipe {path} must hold named keys (base, task, tunings ...).")
    content["data"] = str(path.parent / str(content.get("data", ".")))
    return make_recipe(content, changes, str(path))


def make_recipe(content: Mapping[str, Any], changes: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Build a recipe from a mapping as YAML gives it; `where` names it in errors."""
    whole = expand(deepcopy(dict(content)), where)  # changes are made in it, not in the caller's
    for change in changes:
        _set(whole, change)
    whole = expand(whole, where)
    shared = whole.get("training") or {}
    if isinstance(whole.get("tunings"), dict) and isinstance(shared, dict):
        whole["tunings"] = {name: _nested(given, shared) for name, given in whole["tunings"].items()}
    whole["data"] = str(Path(str(whole.get("data", "."))).expanduser().absolute())
    try:
        return Recipe.model_validate(whole)
    except ValidationError as error:
        raise UserError("\n".join(f"{where}: {_explain(one)}" for one in _apart(error))) from None


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def _set(whole: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise UserError(f"--set {change!r} is not of the form key.key=value, for example training.epochs=2.")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {key}: {value!r} is not valid YAML.") from None
    *path, last = key.split(".")
    place: Any = whole
    for step in path:
        if place.get(step) is None:
            place[step] = {}
        place = place[step]
        if not isinstance(place, dict):
            raise UserError(f"--set {key}: {step} holds {place!r}, which has no keys.")
    place[last] = parsed
    if path == ["training"]:  # the last word: it also stands above what a tuning says for itself
        for tuning in (whole.get("tunings") or {}).values():
            if isinstance(tuning, dict) and isinstance(tuning.get("training"), dict):
                tuning["training"].pop(last, None)


def _nested(given: Any, shared: dict[str, Any]) -> Any:
    if not isinstance(given, dict):
        return given
    own_keys = ("tasks", "replay")
    method = {key: value for key, value in given.items() if key not in ("training", *own_keys)}
    trains = hasattr(METHODS.get(method.get("method", "")), "defaults")
    chosen = {key: given[key] for key in own_keys if key in given}
    if not trains:
        method |= chosen  # nothing is trained: unknown keys
        chosen = {}
    own = given.get("training") or {}
    if own and not trains:
        return {"method": method, "training": {"nothing is trained, so remove": own}}
    training = {**shared, **own} if trains and isinstance(own, dict) else {}
    return {"method": method, "training": training, **chosen}


def _apart(error: ValidationError) -> list[Any]:
    """The mistakes, each once: a wrong shared training setting is also wrong in every tuning."""
    found = [(one, _place(one["loc"])) for one in _by_input(error)]
    shared = {tuple(place) for _, place in found if place[:1] == ["training"]}
    return [one for one, place in found if place[:1] != ["tunings"] or tuple(place[2:]) not in shared]


def _by_input(error: ValidationError) -> list[Any]:
    """The mistakes, of a value that is of none of the types allowed one: pydantic tells one for each type."""
    found: dict[Any, Any] = {}
    for number, one in enumerate(error.errors()):
        *path, last = one["loc"] or ("",)
        if one["type"] in UNKNOWN or one["type"] == "missing" or not TYPE.fullmatch(str(last)):
            found[number] = one
            continue
        before = found.get(key := tuple(path))
        said = f"{before['msg']}, or {_lower(one['msg'])}" if before else one["msg"]
        found[key] = {**one, "loc": key, "msg": said}
    return list(found.values())


def _lower(message: str) -> str:
    return message[0].lower() + message[1:]


def _explain(error: Any) -> str:
    place = _place(error["loc"])
    key = ".".join(place) or "(top level)"
    if error["type"] in UNKNOWN:
        return f"unknown key '{key}'. {nearest(place[-1], _allowed(place[:-1], error['loc']))}"
    if error["type"] == "missing":
        return f"'{key}' is missing."
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        given = (
            str((error["input"] or {}).get("method", "")) if isinstance(error["input"], dict) else str(error["input"])
        )
        return f"'{key}': unknown method {given!r}. {nearest(given, METHODS)}"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], (dict, list)):
        return f"'{key}': {message}" if place else message
    return f"'{key}': {_lower(message)} (given: {error['input']!r})."


def _place(loc: Sequence[Any]) -> list[str]:
    """The path as the user wrote it: without the tags that unions add."""
    parts = [str(part) for part in loc]
    if parts[:1] == ["tunings"] and len(parts) > 2 and parts[2] == "method":
        parts = parts[:2] + parts[4 if len(parts) > 3 and parts[3] in METHODS else 3 :]
    return [part for part in parts if part not in ("file", "share", "<task>", "<mixture>")]


def _allowed(place: list[str], loc: Sequence[Any]) -> list[str]:
    if not place:
        return list(Recipe.model_fields)
    if place[-1] == "replay":
        return [one.name for one in fields(Replay)]
    if place[-1] == "training":
        return [one.name for one in fields(TrainingSettings)]
    if place[0] == "tunings":
        kind = METHODS.get(str(loc[3])) if len(loc) > 3 else None
        return [*(one.name for one in fields(kind)), "training", "tasks", "replay"] if kind else []  # type: ignore[arg-type]
    if place[0] == "decoding":
        return [one.name for one in fields(Decoding)]
    if place[0] == "base":
        return [one.name for one in fields(BaseSpec)]
    if place[-1] in ("train", "validation", "test"):
        return [one.name for one in fields(Source)]
    if place[-1].isdigit() and "tasks" in place:
        return [one.name for one in fields(Member)]
    return [one.name for one in fields(Mixture if "<mixture>" in loc[-2:-1] else Task)]


def differing_key(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first key in which two recipes differ."""
    for key in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            if found := differing_key(a, b, f"{prefix}{key}."):
                return found
        elif a != b:
            return f"{prefix}{key}"
    return None
