"""From the stages' results to one report."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from luthier.data.task import Task
from luthier.evaluation.bootstrap import compare, holm
from luthier.evaluation.kept import MEAN, entry, sampled
from luthier.metrics.score import Score as Measured
from luthier.recipe import Recipe
from luthier.report.answer import answer
from luthier.report.schema import (
    SCHEMA_VERSION,
    AuditFinding,
    Difference,
    ExampleReport,
    MixtureRow,
    Report,
    Retention,
    Score,
    TuningReport,
)

SHOWN_EXAMPLES = 3


def build_report(
    recipe: Recipe,
    environment: dict[str, Any],
    audit: list[dict[str, Any]],
    baseline: dict[str, Any],
    results: dict[str, dict[str, Any]],
    predictions: dict[str, list[dict[str, Any]]],
    human: Mapping[str, Mapping[str, Measured]],
) -> Report:
    """Compare the tunings of a run; `results` and `predictions` are by tuning, as the stages wrote them.

    `human` holds the references' own scores by task and metric, for tasks with several.
    """
    task = recipe.task
    metric = task.judged_by[-1] if isinstance(task, Task) else MEAN
    base = next(iter(results.values()))["base"]
    tunings = {
        name: _tuning(recipe, name, result, predictions.get(name, []), baseline, base["parameters"])
        for name, result in results.items()
    }
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
        examples=_examples(predictions),
        audit=[AuditFinding(**{**one, "rows": list(one["rows"])[:20]}) for one in audit],
        recipe=recipe.model_dump(mode="json"),
        environment=environment,
    )
    return report.model_copy(update={"answer": answer(report)})


def _tuning(
    recipe: Recipe,
    name: str,
    result: dict[str, Any],
    predictions: list[dict[str, Any]],
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


def _examples(predictions: dict[str, list[dict[str, Any]]]) -> list[ExampleReport]:
    """The first examples of the test split: not chosen, so they flatter nobody."""
    first = next((lines for lines in predictions.values() if lines), [])
    return [
        ExampleReport(
            id=line["id"],
            prompt=line["input"],
            references=line["references"],
            # Every tuning answered the same examples in the same order.
            outputs={name: lines[place]["prediction"] for name, lines in predictions.items() if lines},
        )
        for place, line in enumerate(first[:SHOWN_EXAMPLES])
    ]
