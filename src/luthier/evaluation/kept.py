"""Scores as a stage's result file keeps them, and what a comparison takes up from there.

A task's entry is {"metrics": the report's entries, "values": each example's own score by metric, "statistics": the rows of
those metrics that are no mean of the values, "seconds"}. A mixture's mean has "of", the task and metric of each part.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from luthier.metrics import METRICS, MODEL_METRICS
from luthier.metrics.resample import RESAMPLES, Sampled, mean, resample
from luthier.metrics.score import Score

MEAN = "mean"  # over the tasks of a mixture, each by its main metric
_INTERVAL = f"interval:bootstrap95|resamples:{RESAMPLES}|seed:0"


def keep(scores: Mapping[str, Score]) -> dict[str, Any]:
    """Scores by metric as JSON."""
    return {
        "metrics": {name: entry(score) for name, score in scores.items()},
        "values": {name: [float(one) for one in score.values] for name, score in scores.items()},
        "statistics": {
            name: [[int(one) if one.is_integer() else one for one in row] for row in score.statistics.tolist()]
            for name, score in scores.items()
            if score.statistics is not None
        },
    }


def entry(score: Score) -> dict[str, Any]:
    """The report's entry for one score: precision and recall stand beside the value, other parts in `parts`."""
    named = {part: score.parts[part] for part in ("precision", "recall") if part in score.parts}
    more = {part: value for part, value in score.parts.items() if part not in named}
    return {
        **_interval(score.sampled, score.signature, len(score.values)),
        **named,
        **({"parts": more} if more else {}),
    }


def keep_mean(scores: Mapping[str, Any], judged: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The entry for a mixture: the mean over its tasks, each by its own metric, (task, metric) one by one.

    Each task's examples are resampled apart from the others': the tasks' shares stay what they are.
    """
    made: dict[str, Any] = {
        "values": {},
        "of": [list(one) for one in judged],
        "seconds": sum(scores[task]["seconds"] for task, _ in judged),
    }
    names = ",".join(metric for _, metric in judged)
    signature = f"metric:mean|of:{names}|tasks:{len(judged)}|resampled:by task"
    examples = sum(len(scores[task]["values"][metric]) for task, metric in judged)
    found = sampled({**scores, "": made}, "", MEAN)
    return {"metrics": {MEAN: _interval(found, signature, examples)}, **made}


def sampled(scores: Mapping[str, Any], task: str, metric: str, seed: int | tuple[int, ...] = 0) -> Sampled:
    """A kept score with its resamples; those of two tunings on one task belong together, draw by draw."""
    found = scores[task]
    if "of" in found and metric == MEAN:
        parts = [sampled(scores, part, by, (0, place)) for place, (part, by) in enumerate(found["of"])]
        return Sampled(float(np.mean([part.value for part in parts])), np.mean([part.draws for part in parts], axis=0))
    if rows := found.get("statistics", {}).get(metric):
        return resample(np.array(rows, dtype=np.float64), (METRICS | MODEL_METRICS)[metric].formula, seed)
    return resample(np.array(found["values"][metric])[:, None], mean, seed)


def _interval(found: Sampled, signature: str, examples: int) -> dict[str, Any]:
    interval = found.interval()
    return {
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "signature": f"{signature}|n:{examples}|{_INTERVAL}",
    }
