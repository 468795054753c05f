"""report.html: one self-contained page, no script from elsewhere, readable on a phone and on paper."""

from pathlib import Path

import jinja2
import yaml

from luthier.metrics import reading
from luthier.report.charts import Bar, Series, bars, lines, smooth
from luthier.report.figures import better, figure, unscaled
from luthier.report.schema import Report, TuningReport
from luthier.report.table import main_score, short, size

_TEMPLATE = Path(__file__).with_name("page.html")


def page(report: Report) -> str:
    """The report as HTML."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"short": short, "size": size, "figure": figure}
    metrics = list(next(iter(report.tunings.values())).scores[report.task])
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        metrics=metrics,
        main_score=main_score,
        better=better,
        unscaled=unscaled(report),
        charts=[(metric, _metric_bars(report, metric)) for metric in metrics],
        training_loss=_curve(report, "loss", "training loss (smoothed)", "nats per target token"),
        validation_loss=_curve(report, "validation_loss", "validation loss", "nats per target token"),
        accuracy=_curve(report, "validation_accuracy", "validation accuracy", "share"),
        retained=list(dict.fromkeys(one.task for one in report.retention)),
        signatures=_signatures(report),
        recipe=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True),
        environment=yaml.safe_dump(report.environment, sort_keys=False, allow_unicode=True),
    )


def _metric_bars(report: Report, metric: str) -> str:
    scale = reading(metric).scale
    scores = {name: tuning.scores[report.task][metric] for name, tuning in report.tunings.items()}
    if human := report.human.get(report.task, {}).get(metric):
        scores["(human)"] = human
    rows = [
        Bar(colour, name, score.value * scale, score.low * scale, score.high * scale, digits=1 if scale == 100 else 2)
        for colour, (name, score) in enumerate(scores.items())
    ]
    return bars(rows, f"{metric} on {report.task}")


def _curve(report: Report, key: str, title: str, unit: str) -> str:
    series = []
    for colour, (name, tuning) in enumerate(report.tunings.items()):
        if points := _points(tuning, key):
            series.append(Series(colour, name, smooth(points) if key == "loss" else points))
    return lines(series, title, "step", unit) if series else ""


def _points(tuning: TuningReport, key: str) -> list[tuple[float, float]]:
    return [(event["step"], event[key]) for event in tuning.history if key in event]


def _signatures(report: Report) -> list[tuple[str, str, str]]:
    tuning = next(iter(report.tunings.values()))
    return [
        (task, metric, score.signature) for task, scores in tuning.scores.items() for metric, score in scores.items()
    ]
