"""A comparison's parts: runs whose scores may stand in one table and one chart; of a single run, all of it."""

from typing import Any

from luthier.report.schema import Report, TuningReport


def parts(report: Report) -> list[tuple[str, Report]]:
    """By a heading (empty where there is one part), the report of the tunings that may be compared with each other."""
    numbers = list(dict.fromkeys(run.part for run in report.runs))
    if len(numbers) < 2:
        return [("", report)]
    found = []
    for number in numbers:
        runs = [run for run in report.runs if run.part == number]
        names = {run.name for run in runs}
        tunings = {name: tuning for name, tuning in report.tunings.items() if tuning.run in names}
        kept = [one for one in report.retention if one.tuning in tunings]
        narrowed = report.model_copy(update={"runs": runs, "tunings": tunings, "retention": kept})
        found.append((", ".join(run.name for run in runs), narrowed))
    return found


def bases(report: Report) -> dict[str, dict[str, Any]]:
    """The bases by run; a report of one run has one, without a name."""
    return {run.name: run.base for run in report.runs} or {"": report.base}


def base_of(report: Report, tuning: TuningReport) -> dict[str, Any]:
    """The base that a tuning adapts."""
    return bases(report)[tuning.run or ""]
