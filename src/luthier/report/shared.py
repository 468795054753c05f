"""What compared runs have in common: the task, its parts, and the metrics that are shown."""

from collections.abc import Sequence
from dataclasses import dataclass

from luthier.errors import UserError
from luthier.report.mismatches import comparable, signature
from luthier.report.schema import TuningReport
from luthier.report.seeds import Repeats


@dataclass(frozen=True)
class Shared:
    """The task and its main metric; the tasks shown, and by task the metrics shown, the main one last.

    Beside the main metric stand only those that all runs measured alike; `common` are all that the runs have of the task.
    """

    task: str
    metric: str
    tasks: list[str]
    metrics: dict[str, list[str]]
    common: list[str]

    def narrowed(self, tuning: TuningReport) -> TuningReport:
        """The tuning with what is shown of the shared tasks; tasks of its own run alone stay as they are."""
        scores = {
            task: {metric: found[metric] for metric in self.metrics.get(task, found)}
            for task, found in tuning.scores.items()
        }
        return tuning.model_copy(update={"scores": scores})


def shared(groups: Sequence[Repeats]) -> Shared:
    """Raises UserError for runs without a task in common, or without a metric of it."""
    task, tasks = _tasks(groups)
    common = {one: _common(groups, one) for one in dict.fromkeys([task, *tasks])}
    if not common[task]:
        told = "; ".join(f"{group.name}: {', '.join(_metrics(group, task))}" for group in groups)
        raise UserError(f"The runs have no metric of {task!r} in common ({told}).")
    metrics = {
        one: [*(metric for metric in found[:-1] if _alike(groups, one, metric)), found[-1]]
        for one, found in common.items()
        if found
    }
    # A mixture's tasks are part of what its mean is compared on; of tasks that stand alone each must be the same by itself.
    mixture = task not in tasks
    kept = [
        one
        for one in tasks
        if one in metrics and (mixture or one == task or len(comparable(groups, one, metrics[one][-1])) == 1)
    ]
    return Shared(task, metrics[task][-1], kept, metrics, common[task])


def _tasks(groups: Sequence[Repeats]) -> tuple[str, list[str]]:
    """The task that all runs are about, and its parts; else the first that all have learnt, alone or in a mixture."""
    reports = [group.first.report for group in groups]
    if all((one.task, one.tasks) == (reports[0].task, reports[0].tasks) for one in reports):
        return reports[0].task, reports[0].tasks
    found = [task for task in reports[0].tasks if all(task in one.tasks for one in reports)]
    if not found:
        told = "; ".join(f"{group.name}: {', '.join(one.tasks)}" for group, one in zip(groups, reports, strict=True))
        raise UserError(f"The runs have no task in common ({told}). Compare runs that were scored on the same task.")
    return found[0], found


def _metrics(group: Repeats, task: str) -> list[str]:
    return list(next(iter(group.first.report.tunings.values())).scores[task])


def _common(groups: Sequence[Repeats], task: str) -> list[str]:
    """The metrics that all runs have of a task, in the first's order: the main one is the last."""
    return [one for one in _metrics(groups[0], task) if all(one in _metrics(group, task) for group in groups)]


def _alike(groups: Sequence[Repeats], task: str, metric: str) -> bool:
    return len({signature(group, task, metric) for group in groups}) == 1
