"""How a metric's numbers are written, and what a difference in them means."""

from pathlib import Path

from luthier.metrics import reading
from luthier.report.schema import Difference, Report

# Chance that any claim of a report's comparisons is false.
ALPHA = 0.05


def figure(value: float, metric: str, signed: bool = False) -> str:
    """A value as the tables show it: shares times 100 with one digit, other metrics as they are with two."""
    scale = reading(metric).scale
    return f"{value * scale:{'+' if signed else ''}.{1 if scale == 100 else 2}f}"


def rank(value: float, metric: str) -> float:
    """A value such that the higher is the better."""
    return -value if reading(metric).lower_is_better else value


def gain(low: float, high: float, metric: str) -> tuple[float, float]:
    """An interval of a difference, turned so that above 0 is better."""
    return (-high, -low) if reading(metric).lower_is_better else (low, high)


def better(one: Difference) -> str | None:
    """The tuning that is better for certain, with all of the report's comparisons in mind; None where neither is."""
    if one.p_corrected >= ALPHA or not one.value:
        return None
    return one.ours if rank(one.value, one.metric) > 0 else one.theirs


def examples_of(signature: str) -> int | None:
    """The number of examples that a signature names."""
    part = next((part for part in signature.split("|") if part.startswith("n:")), "")
    return int(part[2:]) if part else None


def base_name(model: str) -> str:
    """A base as headings name it: of a folder its own name, a hub id as it is."""
    return Path(model).name if Path(model).is_absolute() else model


def unscaled(report: Report) -> str:
    """What a table must say of metrics that it does not show times 100; empty where there are none."""
    scores = next(iter(report.tunings.values())).scores[report.task]
    names = [metric for metric in scores if reading(metric).scale == 1]
    return f" ({', '.join(names)} as {'it is' if len(names) == 1 else 'they are'})" if names else ""
