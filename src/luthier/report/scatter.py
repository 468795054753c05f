"""Quality against a cost: a point a tuning with its interval, the cost on a logarithmic axis with a place for none at all."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from luthier.report.marks import WIDTH, framed, legend, shape, ticks

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 250, 46, 22, 22, 38
_NONE = 34  # width of the place for a cost of zero, which has no logarithm


@dataclass(frozen=True)
class Point:
    """A tuning's cost and score with its interval, as shown (shares already x100)."""

    place: int
    name: str
    cost: float
    value: float
    low: float
    high: float


def scatter(
    points: Sequence[Point],
    title: str,
    x_name: str,
    y_name: str,
    written: Callable[[float], str],
    digits: int = 1,
    lower_is_better: bool = False,
) -> str:
    """The points and, dotted, the frontier: where a better score costs more; empty where fewer than two costs differ.

    `written` writes a cost.
    """
    costs = sorted({point.cost for point in points if point.cost > 0})
    if len({point.cost for point in points}) < 2 or not costs:
        return ""
    free = any(point.cost == 0 for point in points)
    low, high = math.log10(costs[0]), math.log10(costs[-1])
    pad = (high - low) * 0.08 or 0.3
    low, high = low - pad, high + pad
    start = _LEFT + (_NONE + 8 if free else 0)
    bottom, top = min(point.low for point in points), max(point.high for point in points)
    margin = (top - bottom) * 0.06 or 0.5
    bottom, top = bottom - margin, top + margin

    def across(cost: float) -> float:
        if not cost:
            return _LEFT + _NONE / 2
        return start + (WIDTH - start - _RIGHT) * (math.log10(cost) - low) / (high - low)

    def up(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (value - bottom) / (top - bottom))

    parts = [
        f'<path class="grid" d="M{_LEFT} {up(tick):.1f}H{WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{up(tick):.1f}" dy="4" text-anchor="end">{tick:g}</text>'
        for tick in ticks(bottom, top)
    ]
    if free:
        parts.append(f'<text x="{across(0):.1f}" y="{_HEIGHT - 21}" text-anchor="middle">none</text>')
        parts.append(f'<path class="grid" d="M{_LEFT + _NONE} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
    for tick in _named(costs, across):
        parts.append(
            f'<text x="{across(tick):.1f}" y="{_HEIGHT - 21}" text-anchor="middle">{escape(written(tick))}</text>'
        )
    parts.append(f'<path class="front" d="{_frontier(points, across, up, -1 if lower_is_better else 1)}"/>')
    for point, x in zip(points, _beside([across(point.cost) for point in points]), strict=True):
        parts.append(f'<path class="whisker" d="M{x:.1f} {up(point.low):.1f}V{up(point.high):.1f}"/>')
        parts.append(shape(point.place, x, up(point.value)))
    parts.append(
        f'<text class="axis" x="{WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{escape(x_name)}</text>'
        f'<text class="axis" x="0" y="11">{escape(y_name)}</text>'
    )
    words = "; ".join(
        f"{point.name}: {point.value:.{digits}f} for {written(point.cost) if point.cost else 'none'}"
        for point in points
    )
    return framed(_HEIGHT, title, words, "".join(parts)) + legend([(point.place, point.name) for point in points])


def _named(costs: Sequence[float], across: Callable[[float], float]) -> list[float]:
    """Costs to name on the axis: powers of ten, at most four; where it spans no two, those of the ends."""
    powers = range(math.ceil(math.log10(costs[0])), math.floor(math.log10(costs[-1])) + 1)
    if len(powers) > 1:
        return [10.0**power for power in powers[:: math.ceil(len(powers) / 4)]]
    return [costs[0], costs[-1]] if across(costs[-1]) - across(costs[0]) > 60 else [costs[-1]]


def _beside(places: Sequence[float], apart: float = 8.0) -> list[float]:
    """Places on the axis such that marks of the same cost stand beside each other."""
    found = list(places)
    for start in sorted({round(place) for place in places}):
        same = [number for number, place in enumerate(places) if round(place) == start]
        for rank, number in enumerate(same):
            found[number] += apart * (rank - (len(same) - 1) / 2)
    return found


def _frontier(
    points: Sequence[Point], across: Callable[[float], float], up: Callable[[float], float], sign: int
) -> str:
    best, path = -math.inf, ""
    for point in sorted(points, key=lambda one: (one.cost, -sign * one.value)):
        if sign * point.value > best:
            x, y = f"{across(point.cost):.1f}", f"{up(point.value):.1f}"
            path += f"H{x}V{y}" if path else f"M{x} {y}"
            best = sign * point.value
    return path
