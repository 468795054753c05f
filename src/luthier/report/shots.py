"""In-context learning: the score against the number of shots, over draws of the examples; and when a tuning pays for itself.

A tuning has read its training rows before its first answer; shots are read again with every request. Reading a token is one pass
through the model, training on one about three (forward, and twice that backward). So a tuning costs less than shots from

    3 x training tokens / (tokens of a prompt with shots - tokens of a prompt to the tuning)        requests on.
"""

import math
from dataclasses import dataclass
from statistics import mean, stdev

from luthier.metrics import reading
from luthier.report.cells import NOTHING, Cell, Table, score_cell
from luthier.report.charts import Series, lines
from luthier.report.figures import figure
from luthier.report.schema import Report, TuningReport

TRAINED_TOKEN = 3  # a trained token in read ones


@dataclass(frozen=True)
class Shown:
    """The tunings that show as many examples, chosen alike; their draws of the examples differ."""

    run: str  # of several
    selection: str
    asked: int
    tunings: list[TuningReport]

    def values(self, report: Report) -> list[float]:
        """The main metric of each draw."""
        return [one.scores[report.task][report.metric].value for one in self.tunings]

    @property
    def held(self) -> float:
        """Mean number of shots that the prompts hold."""
        return mean(one.shots.mean for one in self.tunings)

    @property
    def prompt_tokens(self) -> float:
        """Mean tokens of a request."""
        return mean(one.prompt_tokens for one in self.tunings)


def shown(report: Report) -> list[Shown]:
    """Prompting by run, selection and number of shots, zero first; of the runs that show examples."""
    groups: dict[tuple[str, str, int], list[TuningReport]] = {}
    for one in report.tunings.values():
        run = one.run or "" if len(report.runs) > 1 else ""
        if one.method == "few_shot":
            groups.setdefault((run, str(one.settings.get("selection", "random")), one.shots.asked), []).append(one)
        elif one.method == "zero_shot":
            groups.setdefault((run, "", 0), []).append(one)
    show = {run for run, _, asked in groups if asked}
    return [Shown(*key, groups[key]) for key in sorted(groups) if key[0] in show]


def shots_table(report: Report) -> Table:
    """The score of each number of shots: with its interval, of several draws their mean and standard deviation."""
    rows = []
    several = len(report.runs) > 1
    for one in shown(report):
        values = one.values(report)
        score = score_cell(one.tunings[0].scores[report.task][report.metric], report.metric)
        if len(values) > 1:
            spread = figure(stdev(values), report.metric)
            score = Cell(figure(mean(values), report.metric), f"sd {spread} over draws", mean(values))
        rows.append(
            (
                *([Cell(one.run)] if several else []),
                Cell(str(one.asked), value=one.asked),
                Cell(one.selection or "-"),
                Cell(str(len(values)), value=len(values)),
                score,
                Cell(f"{one.held:.1f}", value=one.held),
                Cell(f"{one.prompt_tokens:.0f}", value=one.prompt_tokens),
            )
        )
    columns = ("shots", "selection", "draws", report.metric, "held", "tokens a request")
    return Table("shots", ("run", *columns) if several else columns, tuple(rows))


def shots_chart(report: Report) -> str:
    """The score against the shots that prompts hold, a line for each run and selection; empty for fewer than three points."""
    found = shown(report)
    scale = reading(report.metric).scale
    point = lambda one: (one.held, mean(one.values(report)) * scale)  # noqa: E731
    series = [
        Series(
            place,
            f"{run} {selection}".strip(),
            [point(one) for one in found if one.run == run and one.selection in ("", selection)],
        )
        for place, (run, selection) in enumerate(dict.fromkeys((one.run, one.selection) for one in found if one.asked))
    ]
    if max((len(one.points) for one in series), default=0) < 3:
        return ""
    return lines(series, f"{report.metric} against the number of shots", "shots", report.metric)


def break_even_table(report: Report) -> Table:
    """For each trained tuning, after how many requests it has cost less than its run's best prompt with shots."""
    sign = -1 if reading(report.metric).lower_is_better else 1
    few = sorted((one for one in shown(report) if one.asked), key=lambda one: sign * mean(one.values(report)))
    best_of = {one.run: one for one in few}
    rows = []
    for name, tuning in report.tunings.items():
        best = best_of.get(tuning.run or "" if len(report.runs) > 1 else "")
        if best is None or not tuning.trainable_parameters or tuning.method == "interpolate":
            continue
        own = tuning.prompt_tokens + virtual_tokens(tuning)
        saved = best.prompt_tokens - own
        requests = math.ceil(TRAINED_TOKEN * tuning.train_tokens / saved) if saved > 0 else None
        rows.append(
            (
                Cell(name, value=name),
                Cell(f"{tuning.train_tokens:,}", value=tuning.train_tokens),
                Cell(f"{own:.0f}", value=own),
                Cell(f"{best.prompt_tokens:.0f}", f"{best.asked} shots, {best.selection}", best.prompt_tokens),
                Cell(f"{requests:,}", value=requests) if requests is not None else NOTHING,
            )
        )
    columns = ("tuning", "training tokens", "tokens a request", "with shots", "cheaper after requests")
    return Table("break-even", columns, tuple(rows))


def virtual_tokens(tuning: TuningReport) -> int:
    """Positions that a soft prompt or prefix takes in every request."""
    soft = tuning.method in ("prompt_tuning", "prefix_tuning")
    return int(str(tuning.settings.get("length", 0))) if soft else 0
