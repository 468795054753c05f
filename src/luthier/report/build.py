"""From the stages' results to one report."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from luthier.data.task import Task
from luthier.evaluation.bootstrap import compare, holm
from luthier.evaluation.kept import MEAN, entry, sampled
from luthier.metrics.score import Score as Measured
from luthier.recipe import BASELINE, Recipe
from luthier.report.answer import answer
from luthier.report.regressions import Answers, regressions
from luthier.report.schema import (
    SCHEMA_VERSION,
    AuditFinding,
    Difference,
    ExampleReport,
    MixtureRow,
    Regression,
    Report,
    Retention,
    Score,
    Snapshot,
    TuningReport,
)

SHOWN_EXAMPLES = 6  # of a mixture, at least one of each task


def build_report(
    recipe: Recipe,
    environment: dict[str, Any],
    audit: list[dict[str, Any]],
    baseline: dict[str, Any],
    results: dict[str, dict[str, Any]],
    answers: Mapping[str, Answers],
    human: Mapping[str, Mapping[str, Measured]],
    planned: Mapping[str, dict[str, int]] | None = None,
) -> Report:
    """Compare the tunings of a run; `results` and `answers` are by tuning, as the stages wrote them.

    `planned` holds the bytes by part that each was expected to hold. `answers` holds the baseline's too. `human` holds the references' own scores by task and metric, for tasks with several.
    """
    task = recipe.task
    metric = task.judged_by[-1] if isinstance(task, Task) else MEAN
    base = next(iter(results.values()))["base"]
    tunings = {
        name: _tuning(recipe, name, result, _own(recipe, answers.get(name, {})), baseline, base["parameters"])
        for name, result in results.items()
    }
    for name, parts in (planned or {}).items():
        tunings[name] = tunings[name].model_copy(update={"planned": parts})
    comparisons = _comparisons(results, task.name, metric)
    retention = [
        _retention(name, kept.name, baseline, result)
        for name, result in results.items()
        for kept in recipe.retention
        if kept.name in result["scores"]
    ]
    report = Report(
        schema_version=SCHEMA_VERSION,
        task=task.name,
        tasks=[one.name for one in recipe.tasks],
        metric=metric,
        answer="",
        base=base,
        base_scores={name: _scores(found) for name, found in baseline["scores"].items()},
        tunings=tunings,
        comparisons=comparisons,
        retention=retention,
        human={
            name: {by: Score(**entry(found)) for by, found in scores.items()}
            for name, scores in human.items()
            if scores
        },
        examples=_examples({name: answers.get(name, {}) for name in results}, [one.name for one in recipe.tasks]),
        regressions=_regressions(recipe, baseline, results, answers),
        audit=[AuditFinding(**{**one, "rows": list(one["rows"])[:20]}) for one in audit],
        recipe=recipe.model_dump(mode="json"),
        environment=environment,
    )
    return report.model_copy(update={"answer": answer(report)})


def _tuning(
    recipe: Recipe,
    name: str,
    result: dict[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    baseline: dict[str, Any],
    base_parameters: int,
) -> TuningReport:
    scores = {task: _scores(found) for task, found in result["scores"].items()}
    if not result["trainable_parameters"]:  # nothing was changed, so nothing was forgotten
        scores |= {task: _scores(found) for task, found in baseline["scores"].items()}
    return TuningReport(
        method=result["method"],
        settings=recipe.model_dump(mode="json")["tunings"][name],
        trainable_parameters=result["trainable_parameters"],
        trainable_share=result["trainable_parameters"] / base_parameters,
        file_bytes=result["file_bytes"],
        train_seconds=result["train_seconds"],
        train_tokens=result.get("train_tokens", 0),
        score_seconds=sum(found["seconds"] for found in result["scores"].values()),
        steps=result["steps"],
        learning_rate=result.get("learning_rate"),
        peak_memory_bytes=result["peak_memory_bytes"],
        memory_after_import_bytes=result["memory_after_import_bytes"],
        validation_loss=result["validation_loss"],
        validation_accuracy=result["validation_accuracy"],
        prompt_tokens=float(np.mean([line["prompt_tokens"] for line in predictions])) if predictions else 0.0,
        shots=result["shots"],
        cut=result["cut"],
        left_out=result.get("left_out", 0),
        mixture=[MixtureRow(**row) for row in result.get("mixture", [])],
        history=result["history"],
        scores=scores,
        inference=result.get("inference"),
        templates=result.get("templates", {}),
        snapshots=[
            Snapshot(step=one["step"], scores={task: _scores(found) for task, found in one["scores"].items()})
            for one in result.get("snapshots", [])
        ],
    )


def _scores(found: dict[str, Any]) -> dict[str, Score]:
    return {metric: Score(**entry) for metric, entry in found["metrics"].items()}


def _comparisons(results: dict[str, Any], task: str, metric: str) -> list[Difference]:
    """Every pair of tunings, later minus earlier, with p-values corrected for their number."""
    scores = {name: sampled(result["scores"], task, metric) for name, result in results.items()}
    pairs = [(ours, theirs) for theirs, ours in combinations(results, 2)]
    found = [compare(scores[ours], scores[theirs]) for ours, theirs in pairs]
    corrected = holm([one.p for one in found])
    return [
        Difference(
            ours=ours, theirs=theirs, task=task, metric=metric,
            value=one.value, low=one.low, high=one.high, p=one.p, p_corrected=adjusted,
        )
        for (ours, theirs), one, adjusted in zip(pairs, found, corrected, strict=True)
    ]  # fmt: skip


def _retention(name: str, task: str, baseline: dict[str, Any], result: dict[str, Any]) -> Retention:
    metric = list(result["scores"][task]["metrics"])[-1]
    found = compare(sampled(result["scores"], task, metric), sampled(baseline["scores"], task, metric))
    return Retention(
        task=task,
        tuning=name,
        metric=metric,
        before=Score(**baseline["scores"][task]["metrics"][metric]),
        after=Score(**result["scores"][task]["metrics"][metric]),
        difference=found.value,
        low=found.low,
        high=found.high,
    )


def _own(recipe: Recipe, answers: Answers) -> list[Mapping[str, Any]]:
    """The answers to the run's own tasks, in their order."""
    return [line for task in recipe.tasks for line in answers.get(task.name, [])]


def _examples(answers: Mapping[str, Answers], tasks: Sequence[str]) -> list[ExampleReport]:
    """The first examples of each task's test split: not chosen, so they flatter nobody."""
    shown = max(1, SHOWN_EXAMPLES // len(tasks))
    found = []
    for task in tasks:
        given = {name: by_task[task] for name, by_task in answers.items() if by_task.get(task)}
        first = next(iter(given.values()), [])
        found += [
            ExampleReport(
                id=line["id"],
                task=task,
                prompt=line["input"],
                references=line["references"],
                # Every tuning answered the same examples in the same order.
                outputs={name: lines[place]["prediction"] for name, lines in given.items()},
            )
            for place, line in enumerate(first[:shown])
        ]
    return found


def _regressions(
    recipe: Recipe, baseline: dict[str, Any], results: dict[str, Any], answers: Mapping[str, Answers]
) -> list[Regression]:
    """Each tuning's worst rows: of its tasks against the prompt with the fewest shots, of retention against the base."""
    prompts = [name for name, result in results.items() if not result["trainable_parameters"]]
    prompt = min(prompts, key=lambda name: results[name]["shots"]["asked"], default=None)
    found = []
    for name, result in results.items():
        after = (result["scores"], answers.get(name, {}))
        if prompt not in (None, name):
            before = (results[prompt]["scores"], answers.get(prompt, {}))
            found += regressions(name, prompt, [task.name for task in recipe.tasks], after, before)
        if result["trainable_parameters"]:
            kept = [task.name for task in recipe.retention]
            found += regressions(name, BASELINE, kept, after, (baseline["scores"], answers.get(BASELINE, {})))
    return found
