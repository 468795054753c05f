"""report.html: one self-contained page, no script from elsewhere, readable on a phone and on paper."""

from collections.abc import Callable, Iterable
from pathlib import Path

import jinja2

from luthier.metrics import reading
from luthier.report.charts import Bar, Series, bars, lines, smooth
from luthier.report.cost_tables import (
    audit_table,
    disk_table,
    inference_table,
    mismatches_table,
    mixture_tables,
    runs_table,
    settings_table,
    settings_text,
    templates_table,
)
from luthier.report.figures import base_name, figure, unscaled
from luthier.report.memory_chart import memory_chart
from luthier.report.parts import parts
from luthier.report.scatter import Point, scatter
from luthier.report.schema import Report, TuningReport
from luthier.report.score_tables import (
    forgetting_table,
    pairs_table,
    signatures_table,
    tasks_table,
    tunings_table,
)
from luthier.report.shots import break_even_table, shots_chart, shots_table
from luthier.report.table import count, size
from luthier.report.tradeoff import matched_table, matched_words, tradeoff_charts
from luthier.report.word_difference import marked

_TEMPLATE = Path(__file__).with_name("page.html")


def page(report: Report) -> str:
    """The report as HTML; a section without data is absent."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"figure": figure, "base": base_name}
    found = parts(report)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        marked=marked,
        unscaled=unscaled(report),
        runs=runs_table(report),
        mismatches=mismatches_table(report),
        parts=[(name, tunings_table(part), tasks_table(part)) for name, part in found],
        pairs=pairs_table(report),
        forgetting=forgetting_table(report),
        tradeoffs=_drawn((name, tradeoff_charts(part)) for name, part in found),
        matched=[(matched_words(part), matched_table(part)) for _, part in found if matched_table(part)],
        mixtures=mixture_tables(report),
        shots=[(name, shots_table(part), shots_chart(part)) for name, part in found if shots_table(part)],
        break_even=break_even_table(report),
        inference=inference_table(report),
        templates=templates_table(report),
        disk=disk_table(report),
        audit=audit_table(report),
        settings=settings_table(report),
        signatures=signatures_table(report),
        scores=[(name, _metric_bars(part)) for name, part in found],
        costs=_drawn((name, _costs(part)) for name, part in found),
        learning=_drawn((name, _learning(part)) for name, part in found),
        recipe=settings_text(report.recipe),
        environment=settings_text(report.environment),
    )


Charts = list[tuple[str, str]]  # a heading and an SVG, empty where there is nothing to show


def _drawn(found: Iterable[tuple[str, Charts]]) -> list[tuple[str, Charts]]:
    """By part of the report, the charts that have anything to show."""
    kept = [(name, [(title, chart) for title, chart in charts if chart]) for name, charts in found]
    return [(name, charts) for name, charts in kept if charts]


def _learning(report: Report) -> Charts:
    accuracy = "Validation accuracy" + ("" if _choices(report) else " of the next token")
    return [
        ("Training loss", _curve(report, "loss", "training loss (smoothed)", "nats per target token")),
        ("Validation loss", _curve(report, "validation_loss", "validation loss", "nats per target token")),
        (accuracy, _curve(report, "validation_accuracy", "validation accuracy", "share")),
    ]


def _metric_bars(report: Report) -> Charts:
    """Each metric's scores with intervals, the main one first."""
    metrics = list(next(iter(report.tunings.values())).scores[report.task])
    return [(metric, _bars(report, metric)) for metric in sorted(metrics, key=lambda one: one != report.metric)]


def _bars(report: Report, metric: str) -> str:
    scale = reading(metric).scale
    scores = {name: tuning.scores[report.task][metric] for name, tuning in report.tunings.items()}
    if human := report.human.get(report.task, {}).get(metric):
        scores["(human)"] = human
    rows = [
        Bar(colour, name, score.value * scale, score.low * scale, score.high * scale, digits=1 if scale == 100 else 2)
        for colour, (name, score) in enumerate(scores.items())
    ]
    return bars(rows, f"{metric} on {report.task}")


def _costs(report: Report) -> Charts:
    """The main metric against what a tuning costs, and, of runs on several bases, against the base's size."""
    kinds: list[tuple[str, str, Callable[[TuningReport], float | None], Callable[[float], str]]] = [
        ("Trained parameters", "parameters", lambda one: one.trainable_parameters, _few),
        ("On disk", "bytes of its file", lambda one: one.file_bytes, lambda bytes_: size(round(bytes_))),
        (
            "Training time",
            "seconds",
            lambda one: one.train_seconds,
            lambda seconds: f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s",
        ),
        ("Peak memory", "bytes", lambda one: one.peak_memory_bytes, lambda bytes_: size(round(bytes_))),
    ]
    sizes = {run.name: run.base["parameters"] for run in report.runs}
    if len(set(sizes.values())) > 1:
        kinds.insert(0, ("Model size", "parameters of the base", lambda one: sizes[one.run or ""], _few))
    scattered = [(title, _scatter(report, title, unit, cost, written)) for title, unit, cost, written in kinds]
    return [*scattered, ("Memory by part, as planned; the line is the measured peak", memory_chart(report))]


def _scatter(
    report: Report,
    title: str,
    unit: str,
    cost: Callable[[TuningReport], float | None],
    written: Callable[[float], str],
) -> str:
    read = reading(report.metric)
    points = []
    for place, (name, tuning) in enumerate(report.tunings.items()):
        score, amount = tuning.scores[report.task][report.metric], cost(tuning)
        if amount is not None:
            value, low, high = (end * read.scale for end in (score.value, score.low, score.high))
            points.append(Point(place, name, amount, value, low, high))
    label = f"{report.metric} against {title.lower()}"
    digits = 1 if read.scale == 100 else 2
    return scatter(points, label, unit, report.metric, written, digits, read.lower_is_better) if points else ""


def _few(number: float) -> str:
    return count(round(number)).replace(".0 ", " ") if number < 1e6 or number >= 1e7 else f"{number / 1e6:.1f} M"


def _curve(report: Report, key: str, title: str, unit: str) -> str:
    series = []
    for colour, (name, tuning) in enumerate(report.tunings.items()):
        if points := _points(tuning, key):
            series.append(Series(colour, name, smooth(points) if key == "loss" else points))
    return lines(series, title, "step", unit) if series else ""


def _points(tuning: TuningReport, key: str) -> list[tuple[float, float]]:
    return [(event["step"], event[key]) for event in tuning.history if event.get(key) is not None]


def _choices(report: Report) -> bool:
    """Whether validation counted answers among choices."""
    recipes = [run.recipe for run in report.runs] or [report.recipe]
    return all(recipe["task"].get("choices") for recipe in recipes)
