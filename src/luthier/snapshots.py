"""Snapshots: weights kept on the way through training, each scored as the end is. They show what a score costs elsewhere."""

from collections.abc import Sequence
from typing import Any

from luthier.scoring import Stage, score_retention, score_tasks
from luthier.training.loop import Hook
from luthier.tuning import detach
from luthier.tuning.files import load_tuning, save_tuning


def snapshot_steps(steps: int, count: int) -> list[int]:
    """The steps that cut a training of `steps` into `count` + 1 even parts; fewer where it is shorter."""
    return sorted({round(steps * part / (count + 1)) for part in range(1, count + 1)} - {0, steps})


def snapshot_name(name: str, step: int) -> str:
    """What a tuning is called as it was after a step: it is saved beside the others and may be used as they are."""
    return f"{name}@{step}"


def keep_snapshots(stage: Stage, name: str, steps: Sequence[int]) -> Hook:
    """A training hook that saves the tuning after each of these steps."""

    def keep(event: dict[str, Any]) -> None:
        if event["step"] in steps and "norm" in event:
            keep_tuning(stage, name, snapshot_name(name, event["step"]))

    return keep


def keep_tuning(stage: Stage, name: str, saved: str) -> int:
    """Save an attached tuning in the run as `saved`; return its files' bytes (0 on ranks that write nothing)."""
    with stage.directory.new_tuning(saved) as folder:
        return save_tuning(stage.base, name, folder, stage.directory.writes)


def score_snapshots(stage: Stage, name: str, steps: Sequence[int], reserve: int) -> list[dict[str, Any]]:
    """Score each snapshot that was reached on the recipe's task and the retention tasks; `name` is as it was afterwards."""
    found = []
    for step in steps:
        saved = snapshot_name(name, step)
        if not stage.directory.has_tuning(saved):
            continue
        scored = stage.directory.result(saved)
        if scored is None:
            stage.progress.say(f"the weights after step {step}")
            _put(stage, name, saved)
            scores = score_tasks(stage, saved, reserve) | score_retention(stage, saved, reserve)
            scored = {"step": step, "scores": {task: {"metrics": one["metrics"]} for task, one in scores.items()}}
            stage.directory.save_result(saved, scored)
        found.append(scored)
    if found:
        _put(stage, name, name)
    return found


def _put(stage: Stage, name: str, saved: str) -> None:
    """Attach what was saved as `saved` in place of the tuning `name`."""
    detach(stage.base, name)
    load_tuning(stage.base, stage.directory.tuning(saved), name)
    stage.base.use(name)
