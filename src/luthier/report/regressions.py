"""The rows on which a tuning lost most: against a prompt on the task, against the untouched base on what it should retain."""

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.metrics import MODEL_METRICS
from luthier.report.figures import rank
from luthier.report.schema import Regression

WORST = 3  # rows a tuning, of its tasks and again of the retention tasks

Answers = Mapping[str, Sequence[Mapping[str, Any]]]  # by task: what was predicted, row by row


def regressions(
    tuning: str,
    against: str,
    tasks: Sequence[str],
    after: tuple[Mapping[str, Any], Answers],
    before: tuple[Mapping[str, Any], Answers],
) -> list[Regression]:
    """The worst rows of some tasks, by each task's main metric; `after` and `before` are a stage's scores and answers.

    Of rows that lost the same, those that stand first. Scores of the model itself (loss) have no answers to show.
    """
    found = []
    for task in tasks:
        named = [name for name in after[0].get(task, {}).get("metrics", {}) if name not in MODEL_METRICS]
        if not named or task not in before[0] or not before[1].get(task) or not after[1].get(task):
            continue
        metric = named[-1]
        values = [scores[task]["values"].get(metric, []) for scores, _ in (after, before)]
        rows = zip(after[1][task], before[1][task], *values, strict=True)
        for ours, theirs, value, was in rows:
            if rank(value, metric) < rank(was, metric):
                found.append(
                    Regression(
                        tuning=tuning, against=against, task=task, id=ours["id"], prompt=ours["input"],
                        references=ours["references"], metric=metric, before=was, after=value,
                        before_output=theirs["prediction"], after_output=ours["prediction"],
                    )
                )  # fmt: skip
    return sorted(found, key=lambda one: -abs(one.after - one.before))[:WORST]
