"""Numbers from strings: one file per metric family, no torch. `METRICS` names them all."""

from collections.abc import Callable, Sequence

from luthier.errors import UserError, nearest
from luthier.metrics.accuracy import accuracy
from luthier.metrics.rouge import rouge
from luthier.metrics.score import Measured

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], Measured]

METRICS: dict[str, Metric] = {
    "rouge1": rouge("rouge1"),
    "rouge2": rouge("rouge2"),
    "rougeL": rouge("rougeL"),
    "rougeLsum": rouge("rougeLsum"),
    "accuracy": accuracy,
}


def metric(name: str) -> Metric:
    """Look a metric up by name; an unknown one is a UserError with the nearest."""
    if name not in METRICS:
        raise UserError(f"Unknown metric {name!r}. {nearest(name, METRICS)}")
    return METRICS[name]
