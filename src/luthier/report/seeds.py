"""Runs of one recipe that differ in the seed alone, put together: means, and what they spread over the seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from luthier.evaluation.bootstrap import over_seeds
from luthier.metrics.resample import Sampled
from luthier.report.runs import FinishedRun
from luthier.report.schema import RunReport, Score, TuningReport


@dataclass(frozen=True)
class Repeats:
    """One run, or several of one recipe; all are scored on the same test examples."""

    name: str
    runs: tuple[FinishedRun, ...]

    @property
    def first(self) -> FinishedRun:
        """The run whose examples and curves are shown."""
        return self.runs[0]

    def seeds(self) -> list[int]:
        """The training seeds, in the runs' order."""
        return [run.report.recipe["seed"] for run in self.runs]

    def sampled(self, tuning: str, task: str, metric: str) -> Sampled:
        """A tuning's score with resamples over examples and, where there are several, over seeds."""
        return self.over([run.sampled(tuning, task, metric) for run in self.runs])

    def over(self, found: Sequence[Sampled]) -> Sampled:
        """Scores of the runs, in their order, as one."""
        return over_seeds(found).sampled if len(found) > 1 else found[0]

    def described(self) -> RunReport:
        """How the comparison names it."""
        report = self.first.report
        return RunReport(
            name=self.name,
            paths=[str(run.directory.path) for run in self.runs],
            seeds=self.seeds(),
            base=report.base,
            recipe=report.recipe,
            environment=report.environment,
        )

    def tuning(self, name: str) -> TuningReport:
        """A tuning's report; over several seeds scores and costs are means, and memory the most."""
        tunings = [run.report.tunings[name] for run in self.runs]
        first = tunings[0].model_copy(update={"run": self.name})
        if len(tunings) == 1:
            return first
        mean: Callable[[str], Any] = lambda key: _mean([getattr(one, key) for one in tunings])  # noqa: E731
        peaks = [one.peak_memory_bytes for one in tunings if one.peak_memory_bytes is not None]
        return first.model_copy(
            update={
                "seeds": self.seeds(),
                "snapshots": [] if len(self.runs) > 1 else first.snapshots,
                "peak_memory_bytes": max(peaks, default=None),
                "scores": {task: {one: self.score(name, task, one) for one in found} for task, found in first.scores.items()},
                **{key: round(mean(key)) for key in ("file_bytes", "train_tokens", "steps")},
                **{
                    key: mean(key)
                    for key in ("train_seconds", "score_seconds", "validation_loss", "validation_accuracy", "prompt_tokens")
                },
            }
        )  # fmt: skip

    def score(self, tuning: str, task: str, metric: str) -> Score:
        """The mean over the seeds with its interval and spread."""
        scores = [run.report.tunings[tuning].scores[task][metric] for run in self.runs]
        if task not in self.first.results[tuning]["scores"]:  # prompting keeps the base's scores: no seed is in them
            return scores[0]
        repeated = over_seeds([run.sampled(tuning, task, metric) for run in self.runs])
        interval = repeated.interval()
        return Score(
            value=interval.value,
            low=interval.low,
            high=interval.high,
            signature=f"{scores[0].signature}|seeds:{len(scores)}",
            precision=_mean([score.precision for score in scores]),
            recall=_mean([score.recall for score in scores]),
            parts={part: float(np.mean([score.parts[part] for score in scores])) for part in scores[0].parts},
            spread=repeated.spread,
        )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def put_together(runs: Sequence[FinishedRun]) -> list[Repeats]:
    """Group runs whose recipes and bases are equal but for the seed and whose test examples are the same."""
    groups: list[list[FinishedRun]] = []
    for run in runs:
        same = next((group for group in groups if _repeat(group[0], run)), None)
        if same is None or run.report.recipe["seed"] in [one.report.recipe["seed"] for one in same]:
            groups.append([run])
        else:
            same.append(run)
    names: list[str] = []
    for group in groups:
        stem = _stem([run.name for run in group])
        taken = [*names, *(run.name for run in runs if run not in group)]
        names.append(stem if stem and stem not in taken else group[0].name)
    return [Repeats(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def _stem(names: Sequence[str]) -> str:
    """What names begin with together: `demo` of `demo-0` and `demo-1`."""
    if len(names) == 1:
        return names[0]
    alike = takewhile(lambda signs: len(set(signs)) == 1, zip(*names, strict=False))
    return "".join(signs[0] for signs in alike).rstrip("-_./ ")


def _repeat(ours: FinishedRun, theirs: FinishedRun) -> bool:
    recipes = [{**run.report.recipe, "seed": None} for run in (ours, theirs)]
    return (
        recipes[0] == recipes[1]
        and ours.report.base["fingerprint"] == theirs.report.base["fingerprint"]
        and ours.report.base["dtype"] == theirs.report.base["dtype"]
        and bool(ours.asked(ours.report.task))
        and ours.asked(ours.report.task) == theirs.asked(theirs.report.task)
    )
