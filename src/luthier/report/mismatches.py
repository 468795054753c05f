"""In what compared runs differ: what forbids a comparison, and what a reader should know."""

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.evaluation.kept import MEAN
from luthier.report.schema import Mismatch
from luthier.report.seeds import Repeats

_MOST = 25  # settings named; runs of other recipes differ in hundreds


def mismatches(groups: Sequence[Repeats], task: str, metrics: Sequence[str]) -> list[Mismatch]:
    """Differences in test examples and signatures, which forbid comparing scores; then in base, settings and environment."""
    forbidding = [_examples(groups, task), *(_signature(groups, task, metric) for metric in metrics)]
    bases = {one.name: one.first.report.base for one in groups}
    environments = {one.name: one.first.report.environment for one in groups}
    settings = _differing("recipe", {one.name: _settings(groups, one) for one in groups})
    if len(settings) > _MOST:
        more = {one.name: "see the recipes below" for one in groups}
        rest = Mismatch(what=f"and {len(settings) - _MOST} settings more", values=more, comparable=True)
        settings = [*settings[:_MOST], rest]
    found = [one for one in forbidding if one]
    return [*found, *_differing("base", bases), *settings, *_differing("environment", environments)]


def _settings(groups: Sequence[Repeats], one: Repeats) -> dict[str, Any]:
    """A recipe without its base, which is compared as it was loaded, and without tunings that others do not have."""
    recipe = {key: value for key, value in one.first.report.recipe.items() if key != "base"}
    shared = set.intersection(*(set(group.first.report.recipe["tunings"]) for group in groups))
    return {**recipe, "tunings": {name: tuning for name, tuning in recipe["tunings"].items() if name in shared}}


def _differing(what: str, values: Mapping[str, Mapping[str, Any]]) -> list[Mismatch]:
    flat = {name: dict(_flat(value)) for name, value in values.items()}
    found = []
    for key in dict.fromkeys(key for one in flat.values() for key in one):
        told = {name: one[key] for name, one in flat.items() if key in one}
        if len(told) < len(flat) or any(value != next(iter(told.values())) for value in told.values()):
            shown = {name: _written(told[name]) if name in told else "-" for name in flat}
            found.append(Mismatch(what=f"{what}: {key}", values=shown, comparable=True))
    return found


def _written(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:60]} ..."


def comparable(groups: Sequence[Repeats], task: str, metric: str) -> list[list[Repeats]]:
    """Runs whose scores may be compared stand in one list: same signature, same test examples in the same order."""
    found: list[list[Repeats]] = []
    for one in groups:
        alike = (together for together in found if same_scores(one, together[0], task, metric))
        if together := next(alike, None):
            together.append(one)
        else:
            found.append([one])
    return found


def same_scores(ours: Repeats, theirs: Repeats, task: str, metric: str) -> bool:
    """Whether two runs measured the same thing on the same test examples."""
    asked = ours.first.asked(task)
    same = bool(asked) and asked == theirs.first.asked(task)
    return same and signature(ours, task, metric) == signature(theirs, task, metric)


def signature(group: Repeats, task: str, metric: str) -> str:
    """What reproduces a metric of the group's runs, of a mixture's mean each part of it, without the number of examples."""
    report = group.first.report
    scores = next(iter(report.tunings.values())).scores
    parts = report.tasks if metric == MEAN and task == report.task else []
    found = [scores[task][metric], *(list(scores[part].values())[-1] for part in parts)]
    return " + ".join(
        "|".join(part for part in score.signature.split("|") if not part.startswith("n:")) for score in found
    )


def _examples(groups: Sequence[Repeats], task: str) -> Mismatch | None:
    asked = [one.first.asked(task) for one in groups]
    if all(asked) and all(one == asked[0] for one in asked):
        return None
    first = {question for questions in asked[0].values() for question in questions}
    values = {}
    for one, found in zip(groups, asked, strict=True):
        questions = [question for questions in found.values() for question in questions]
        shared = sum(question in first for question in questions)
        values[one.name] = f"{len(questions)}, {shared} as in {groups[0].name}" if found else "not known"
    return Mismatch(what=f"test examples of {task}", values=values, comparable=False)


def _signature(groups: Sequence[Repeats], task: str, metric: str) -> Mismatch | None:
    values = {one.name: signature(one, task, metric) for one in groups}
    if len(set(values.values())) == 1:
        return None
    return Mismatch(what=f"signature of {metric}", values=values, comparable=False)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Keys of nested mappings, joined by dots; a list is one value, and so is a data file with its options."""
    if not isinstance(value, Mapping) or not value:
        return [(prefix, value)]
    if "path" in value:
        return [(prefix, ", ".join(f"{key}: {one}" for key, one in value.items() if one not in (None, False, {}, [])))]
    return [one for key, inner in value.items() for one in _flat(inner, f"{prefix}.{key}" if prefix else str(key))]
