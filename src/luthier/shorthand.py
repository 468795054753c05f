"""A recipe's shorthands written out: tasks by name, files by path, methods as a list, mixtures by preset."""

from pathlib import Path
from typing import Any

import yaml

from luthier.data.library import task_files
from luthier.data.mixture import flan2022
from luthier.errors import UserError, nearest

RETENTION = ["topics", "knowledge", "instructions"]


def expand(whole: dict[str, Any], where: str) -> dict[str, Any]:
    """Write shorthands out: a base by name, a task by name, a list of methods, a file by its path."""
    if isinstance(whole.get("base"), str):
        whole["base"] = {"model": whole["base"]}
    folder = Path(str(whole.get("data", ".")))
    if "task" in whole:
        whole["task"] = _task(whole["task"], folder, where)
    retention = whole.get("retention", RETENTION)
    if isinstance(retention, list):
        whole["retention"] = [_task(one, folder, where) for one in retention]
    tunings = whole.get("tunings")
    if isinstance(tunings, list):
        tunings = {str(name): {} for name in tunings}
    if isinstance(tunings, dict):
        named = {
            name: {"method": name, **(given or {})} if given is None or isinstance(given, dict) else given
            for name, given in tunings.items()
        }
        for given in named.values():
            if isinstance(given, dict) and isinstance(given.get("replay"), dict) and "task" in given["replay"]:
                given["replay"] = {**given["replay"], "task": _task(given["replay"]["task"], folder, where)}
        whole["tunings"] = {
            new: one for name, given in named.items() for new, one in _few_shot(str(name), given, where).items()
        }
    return whole


def _few_shot(name: str, given: Any, where: str) -> dict[str, Any]:
    """A few_shot with lists of shots or draws as a tuning for each pair: `few_shot_4_draw1`."""
    if not isinstance(given, dict) or given.get("method") != "few_shot":
        return {name: given}
    lists = {key: given[key] for key in ("shots", "draw") if isinstance(given.get(key), list)}
    for key, values in lists.items():
        if not values or len(set(map(str, values))) < len(values):
            raise UserError(
                f"{where}: tunings.{name}.{key}: a list holds different numbers, at least one; given: {values}."
            )
    found: dict[str, Any] = {}
    for shots in lists.get("shots", [None]):
        for draw in lists.get("draw", [None]):
            chosen = {key: one for key, one in (("shots", shots), ("draw", draw)) if one is not None}
            end = "" if shots is None else f"_{shots}"
            found[name + end + ("" if draw is None else f"_draw{draw}")] = {**given, **chosen}
    return found


def _task(given: Any, folder: Path, where: str) -> Any:
    if isinstance(given, str):
        files = task_files()
        path = files.get(given) or (folder / given if given.endswith((".yaml", ".yml")) else None)
        if path is None:
            raise UserError(f"{where}: unknown task {given!r}. {nearest(given, files)} Or define it in the recipe.")
        try:
            given = {"name": given, **yaml.safe_load(path.read_text(encoding="utf-8"))}
        except (OSError, yaml.YAMLError, TypeError) as error:
            raise UserError(f"{where}: the task file {path} could not be read: {error}.") from None
    if isinstance(given, dict) and "preset" in given:
        given = _preset(given, where)
    if isinstance(given, dict) and isinstance(given.get("tasks"), list):
        return {**given, "tasks": [_member(one, folder, where) for one in given["tasks"]]}
    if isinstance(given, dict):
        for split in ("train", "validation", "test"):
            if isinstance(given.get(split), str):
                given = {**given, split: {"path": given[split]}}
    return given


def _member(given: Any, folder: Path, where: str) -> Any:
    """A member of a mixture: a task, or one with its rate and forms (`task`, `rate`, `forms`, `shots`)."""
    if isinstance(given, dict) and "task" in given:
        return {**given, "task": _task(given["task"], folder, where)}
    return {"task": _task(given, folder, where)}


def _preset(given: dict[str, Any], where: str) -> dict[str, Any]:
    if given["preset"] != "flan2022":
        raise UserError(
            f"{where}: unknown mixture preset {given['preset']!r}. {nearest(str(given['preset']), ['flan2022'])}"
        )
    sources = given.get("sources")
    if not isinstance(sources, dict) or not all(isinstance(tasks, list) and tasks for tasks in sources.values()):
        raise UserError(
            f"{where}: the preset flan2022 needs `sources`: a list of tasks for muffin, t0, niv2, cot or dialog."
        )
    rest = {key: value for key, value in given.items() if key not in ("preset", "sources")}
    return {**rest, "tasks": flan2022(sources)}
