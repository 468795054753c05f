"""Finished runs, opened for comparison: what each reported, and the rows behind its scores."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from luthier.directory import RunDirectory
from luthier.errors import UserError
from luthier.evaluation.kept import sampled
from luthier.metrics.resample import Sampled
from luthier.recipe import BASELINE
from luthier.report.schema import SCHEMA_VERSION, Report

Question = tuple[str, tuple[str, ...]]  # a test example's id and references


@dataclass(frozen=True)
class FinishedRun:
    """A run with its report; `name` is short and unique among those compared."""

    name: str
    directory: RunDirectory
    report: Report

    @cached_property
    def results(self) -> dict[str, dict[str, Any]]:
        """What the stages found, by tuning; raises UserError where a file is gone."""
        found = {}
        for tuning in self.report.tunings:
            result = self.directory.result(tuning)
            if result is None:
                raise UserError(
                    f"The run {self.directory.path} lacks results/{tuning}.json; continue it with --resume."
                )
            found[tuning] = result
        return found

    @cached_property
    def questions(self) -> dict[str, list[Question]]:
        """By task, its test examples; none for a task that was scored without answers."""
        answers = self.directory.answers(next(iter(self.report.tunings)))
        return {task: [(line["id"], tuple(line["references"])) for line in lines] for task, lines in answers.items()}

    def asked(self, task: str) -> dict[str, list[Question]]:
        """The test examples of a task, of a mixture those of its tasks; empty where they cannot be known."""
        names = self.report.tasks if task == self.report.task else [task]
        found = {name: self.questions.get(name, []) for name in names}
        return found if all(found.values()) else {}

    def sampled(self, tuning: str, task: str, metric: str) -> Sampled:
        """A tuning's score with its resamples."""
        return sampled(self.results[tuning]["scores"], task, metric)

    def baseline(self, task: str, metric: str) -> Sampled:
        """The untouched base's score on a retention task with its resamples."""
        result = self.directory.result(BASELINE)
        if result is None:
            raise UserError(f"The run {self.directory.path} lacks results/{BASELINE}.json; continue it with --resume.")
        return sampled(result["scores"], task, metric)


def open_runs(paths: Sequence[Path]) -> list[FinishedRun]:
    """Open finished runs.

    Raises UserError for fewer than two, for one given twice, for a folder that is no run, and for a run without a report.
    """
    whole = [path.resolve() for path in paths]
    if twice := [path for path, found in zip(paths, whole, strict=True) if whole.count(found) > 1]:
        raise UserError(f"{twice[0]} is given twice; a run is compared with others, not with itself.")
    if len(paths) < 2:
        raise UserError("One run alone is its own report.html. Give two or more run directories to compare.")
    names = short_names(whole)
    return [FinishedRun(name, *_read(path)) for name, path in zip(names, paths, strict=True)]


def _read(path: Path) -> tuple[RunDirectory, Report]:
    directory = RunDirectory.open(path)
    file = path / "report.json"
    if not file.is_file():
        raise UserError(f"The run {path} is unfinished: it holds no report.json. Finish it with luthier run --resume.")
    try:
        report = Report.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        said = str(error).splitlines()[0]
        raise UserError(
            f"{file} is no report of schema version {SCHEMA_VERSION} ({said}). Write it anew with luthier run --resume."
        ) from None
    return directory, report


def short_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents as tell them apart."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]).lstrip("/") for path in paths]
        if len(set(names)) == len(names):
            break
    return names
