"""What a score costs in forgetting: the way of each tuning from the base, and what all had lost where they reached one score.

A way leads from the base through the snapshots of training to the tuning, or through its interpolations. Between two points
that were scored, the line between them is read.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from luthier.metrics import reading
from luthier.report.cells import NOTHING, Cell, Table
from luthier.report.charts import Series, lines
from luthier.report.figures import figure, rank
from luthier.report.schema import Report, Retention, Score, TuningReport


@dataclass(frozen=True)
class Point:
    """Scores at one place of a way: the main metric and each retention task by its own."""

    where: float  # a step, or a share of the change
    score: float
    kept: dict[str, float]


@dataclass(frozen=True)
class Way:
    """A tuning's points, the base first where it was scored on the task too."""

    tuning: str
    interpolated: bool
    points: list[Point]
    colour: int  # the place in the report of the tuning, or of its first interpolation

    @property
    def name(self) -> str:
        """The tuning, and whether its way is that back to the base."""
        return f"{self.tuning}, interpolated" if self.interpolated else self.tuning

    def reached(self, score: float, metric: str) -> Point | None:
        """The first place where the main metric is as good as `score`; None where it never is."""
        for place, after in enumerate(self.points):
            if rank(after.score, metric) < rank(score, metric):
                continue
            before = self.points[place - 1] if place else after
            part = (score - before.score) / (after.score - before.score) if after.score != before.score else 1.0
            kept = {task: _between(before.kept[task], value, part) for task, value in after.kept.items()}
            return Point(_between(before.where, after.where, part), score, kept)
        return None


def _between(before: float, after: float, part: float) -> float:
    return before + part * (after - before)


def ways(report: Report) -> list[Way]:
    """Of every tuning with snapshots or interpolations; empty without retention tasks."""
    by = {one.task: one for one in report.retention}
    found = []
    for name, tuning in report.tunings.items():
        if not tuning.trainable_parameters or tuning.method == "interpolate" or not by:
            continue
        run = name.rpartition("/")[0]
        start = _start(report, run, {one.task: one.before.value for one in report.retention if one.tuning == name})
        for interpolated, middle in ((False, _snapshots(name, tuning)), (True, _interpolations(report, run, name))):
            end = Scored(1.0 if interpolated else float(tuning.steps), name, tuning.scores)
            points = [_point(report, by, one) for one in [*sorted(middle, key=lambda one: one.where), end]]
            if middle and all(points):
                colour = list(report.tunings).index(middle[0].tuning)
                found.append(Way(name, interpolated, start + [one for one in points if one], colour))
    return found


@dataclass(frozen=True)
class Scored:
    """All scores at a place of a way, and the tuning of the report that they are of."""

    where: float
    tuning: str
    scores: dict[str, dict[str, Score]]


def _start(report: Report, run: str, before: dict[str, float]) -> list[Point]:
    """The base, where a prompt without shots says what it scores on the task."""
    for name, tuning in report.tunings.items():
        if tuning.method == "zero_shot" and name.rpartition("/")[0] == run:
            return [Point(0.0, tuning.scores[report.task][report.metric].value, before)]
    return []


def _snapshots(name: str, tuning: TuningReport) -> list[Scored]:
    return [Scored(float(one.step), name, one.scores) for one in tuning.snapshots]


def _interpolations(report: Report, run: str, of: str) -> list[Scored]:
    return [
        Scored(float(one.settings.get("share", 0.5)), name, one.scores)
        for name, one in report.tunings.items()
        if one.method == "interpolate"
        and name.rpartition("/")[0] == run
        and one.settings.get("of") == of.rpartition("/")[2]
    ]


def _point(report: Report, by: dict[str, Retention], found: Scored) -> Point | None:
    """None where a task of the report was not scored there."""
    main = found.scores.get(report.task, {}).get(report.metric)
    kept = {task: found.scores.get(task, {}).get(one.metric) for task, one in by.items()}
    if main is None:
        return None
    known = {task: one.value for task, one in kept.items() if one is not None}
    return Point(found.where, main.value, known) if known.keys() == by.keys() else None


def tradeoff_charts(report: Report) -> list[tuple[str, str]]:
    """For each retention task: its score against the task's, a line for each way."""
    found = ways(report)
    scale = reading(report.metric).scale
    drawn = []
    for one in {one.task: one for one in report.retention}.values() if found else ():
        own = reading(one.metric).scale
        series = [
            Series(way.colour, way.name, [(point.score * scale, point.kept[one.task] * own) for point in way.points])
            for way in found
        ]
        title = f"{one.task} ({one.metric}) against {report.metric}"
        drawn.append((title, lines(series, title, report.metric, one.metric, from_zero=False, marks=True)))
    return drawn


def matched_score(report: Report) -> float | None:
    """The best score that every way reaches; None for fewer than two of them."""
    found = ways(report)
    if len(found) < 2:
        return None
    ranks = [max(rank(point.score, report.metric) for point in way.points) for way in found]
    return rank(min(ranks), report.metric)


def matched_table(report: Report) -> Table:
    """What each way had changed on the retention tasks where it first was as good as the matched score."""
    score = matched_score(report)
    if score is None:
        return Table("matched", (), ())
    tasks = {one.task: one for one in report.retention}
    rows = []
    for way in ways(report):
        at = way.reached(score, report.metric)
        assert at is not None, "every way reaches the matched score"
        place = f"{at.where:.0%} of the change" if way.interpolated else f"step {at.where:.0f}"
        before = {one.task: one.before.value for one in report.retention if one.tuning == way.tuning}
        changes = list(_changes(at, before, tasks.values()))
        rows.append((Cell(way.name, value=way.name), Cell(place, value=at.where), *changes))
    heads = [f"{task} ({one.metric})" for task, one in tasks.items()]
    return Table("matched", ("tuning", "reached at", *heads), tuple(rows))


def _changes(at: Point, before: dict[str, float], tasks: Iterable[Retention]) -> Iterator[Cell]:
    for one in tasks:
        if one.task not in before:
            yield NOTHING
            continue
        change = at.kept[one.task] - before[one.task]
        yield Cell(figure(change, one.metric, signed=True), value=change)


def matched_words(report: Report) -> str:
    """The score at which ways are compared, in words; empty where they are not."""
    score = matched_score(report)
    return "" if score is None else f"Where each first reached {report.metric} {figure(score, report.metric)}"
