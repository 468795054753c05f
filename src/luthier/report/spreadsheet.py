"""report.csv: a row for every tuning, task and metric, unrounded, for plots and tables of one's own."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from luthier.report.figures import examples_of
from luthier.report.parts import base_of
from luthier.report.schema import Report, Score

COLUMNS = (
    "tuning", "method", "run", "base", "base_parameters", "task", "metric", "value", "low", "high", "n", "spread",
    "precision", "recall", "signature", "trained_parameters", "trained_share", "file_bytes", "train_seconds", "peak_memory_bytes",
)  # fmt: skip


def spreadsheet(report: Report) -> str:
    """The scores as CSV with a header; the untouched base and the human references are rows too, without costs."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(report))
    return text.getvalue()


def _rows(report: Report) -> Iterator[dict[str, Any]]:
    for name, tuning in report.tunings.items():
        base = base_of(report, tuning)
        shared = {
            "tuning": name, "method": tuning.method, "run": tuning.run or "", "base": base["model"],
            "base_parameters": base["parameters"], "trained_parameters": tuning.trainable_parameters,
            "trained_share": tuning.trainable_share, "file_bytes": tuning.file_bytes,
            "train_seconds": tuning.train_seconds,
            "peak_memory_bytes": _known(tuning.peak_memory_bytes),
        }  # fmt: skip
        yield from (shared | row for row in _scores(tuning.scores))
    yield from ({"tuning": "(base)"} | row for row in _scores(report.base_scores))
    yield from ({"tuning": "(human)"} | row for row in _scores(report.human))


def _scores(scores: dict[str, dict[str, Score]]) -> Iterator[dict[str, Any]]:
    for task, found in scores.items():
        for metric, score in found.items():
            yield {
                "task": task, "metric": metric, "value": score.value, "low": score.low, "high": score.high,
                "n": examples_of(score.signature) or "", "signature": score.signature, "spread": _known(score.spread),
                "precision": _known(score.precision), "recall": _known(score.recall),
            }  # fmt: skip


def _known(value: float | None) -> float | str:
    return "" if value is None else value
