"""Files of FLAN pairs: YAML or JSON, a task's pairs by the form of a mixture that they are for."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from luthier.data.formats.flan import Fields, FlanTemplate, Pattern
from luthier.errors import UserError, nearest

# A task's sets of pairs in a file, and the form of a mixture that each is for.
SETS = {
    "pairs": "zero_shot_options",
    "no_options": "zero_shot",
    "few_shot": "few_shot_options",
    "few_shot_no_options": "few_shot",
}
# Where a file lacks a form's own set, the next best.
_FALLBACK = {
    "pairs": ("pairs",),
    "no_options": ("no_options", "pairs"),
    "few_shot": ("few_shot", "pairs"),
    "few_shot_no_options": ("few_shot_no_options", "no_options", "few_shot", "pairs"),
}


def find_templates(path: Path, task: str, choices: tuple[str, ...] | None, kind: str = "pairs") -> list[FlanTemplate]:
    """A task's pairs of a file, of the set `kind` or the next best; an unknown task or set is a UserError with the nearest."""
    content = _content(path)
    if task not in content:
        raise UserError(f"{path} has no pairs for a task {task!r}. {nearest(task, content)}")
    if kind not in SETS:
        raise UserError(f"{path}: {task}: unknown set of pairs {kind!r}. {nearest(kind, SETS)}")
    try:
        made = Fields(**content[task].get("fields", {}))
        for rewrites in made.replace.values():
            for old, _ in rewrites:
                re.compile(old)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"{path}: {task}: `fields` has replace, labels and add: {error}.") from None
    found = read_patterns(path)[task]
    best = next(one for one in _FALLBACK[kind] if one in found)
    return [FlanTemplate(pattern, choices, made) for pattern in found[best]]


def read_patterns(path: Path) -> dict[str, dict[str, list[Pattern]]]:
    """Sets of template pairs by task from a YAML or JSON file.

    ``{task: [pair, ...]}``, or ``{task: {fields, pairs, no_options, few_shot, few_shot_no_options}}`` of which all but
    `pairs` may be left out. Raises UserError for a file that is none and for an unknown key.
    """
    return {
        task: {
            kind: [_pattern(pair, f"{path}: {task}, {kind} {number}") for number, pair in enumerate(given[kind], 1)]
            for kind in SETS
            if kind in given
        }
        for task, given in _content(path).items()
    }


def _content(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} could not be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is no FLAN file: task names, each with a list of template pairs, or with `fields` and `pairs`."
        )
    found = {str(task): {"pairs": given} if isinstance(given, list) else given for task, given in content.items()}
    for task, given in found.items():
        if not isinstance(given, dict) or not given.get("pairs"):
            raise UserError(
                f"{path} is no FLAN file: task names, each with a list of template pairs, or with `fields` and `pairs`; "
                f"{task} has no pairs."
            )
        for key, pairs in given.items():
            if key != "fields" and (key not in SETS or not isinstance(pairs, list)):
                raise UserError(
                    f"{path}: {task}: unknown key {key!r}. {nearest(str(key), [*SETS, 'fields'])}"
                    if key not in SETS
                    else f"{path}: {task}: {key!r} must be a list of pairs."
                )
    return found


def _pattern(pair: Any, where: str) -> Pattern:
    if isinstance(pair, list) and len(pair) == 2:  # the short form: [inputs, targets]
        pair = {"inputs": pair[0], "targets": pair[1]}
    if not isinstance(pair, dict) or not {"inputs", "targets"} <= pair.keys():
        raise UserError(f"{where} must hold `inputs` and `targets`.")
    allowed = [one.name for one in fields(Pattern)]
    for key in pair:
        if key not in allowed:
            raise UserError(f"{where}: unknown key {key!r}. {nearest(str(key), allowed)}")
    return Pattern(**{key: str(value) for key, value in pair.items()})
