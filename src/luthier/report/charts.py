"""Bars and curves as inline SVG that follow the page's colours: no script, no outside file, a text for every picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from luthier.report.marks import WIDTH, colour, framed, legend, shape, shortened, stroke, ticks


@dataclass(frozen=True)
class Bar:
    """A labelled value with its interval; `colour` is the tuning's place in the report."""

    colour: int
    label: str
    value: float
    low: float
    high: float
    digits: int = 1


def bars(rows: Sequence[Bar], title: str) -> str:
    """Horizontal bars from zero with 95 % intervals; values as shown (shares already x100)."""
    high = max((row.high for row in rows), default=0.0)
    high, low = max(high, 0.0) or 1.0, min(0.0, *(row.low for row in rows))
    left, right, pitch = 14 + 7 * min(22, max(len(row.label) for row in rows)), 50, 30
    span = WIDTH - left - right

    def at(value: float) -> float:
        return left + span * (value - low) / (high - low)

    parts = []
    for place, row in enumerate(rows):
        y = 8 + place * pitch
        near, far = sorted((at(0), at(row.value)))
        parts.append(
            f'<text x="{left - 10}" y="{y + 13}" text-anchor="end">{shortened(row.label)}</text>'
            f'<rect class="{colour(row.colour)} bar" x="{near:.1f}" y="{y}" width="{max(far - near, 0.5):.1f}" height="18" rx="3"/>'
            f'<path class="whisker" d="M{at(row.low):.1f} {y + 9}H{at(row.high):.1f}'
            f'M{at(row.low):.1f} {y + 4}v10M{at(row.high):.1f} {y + 4}v10"/>'
            f'<text x="{max(at(row.high), at(0)) + 8:.1f}" y="{y + 13}">{row.value:.{row.digits}f}</text>'
        )
    words = "; ".join(
        f"{row.label} {row.value:.{row.digits}f} (95 % from {row.low:.{row.digits}f} to {row.high:.{row.digits}f})"
        for row in rows
    )
    return framed(8 + len(rows) * pitch, title, words, "".join(parts))


@dataclass(frozen=True)
class Series:
    """A named line of (x, y) points."""

    colour: int
    name: str
    points: Sequence[tuple[float, float]]


def lines(
    series: Sequence[Series], title: str, x_name: str, y_name: str, from_zero: bool = True, marks: bool = False
) -> str:
    """One line for each series, with a legend; `marks` on every point, else on the last. x begins at 0 or at its least."""
    points = [point for one in series for point in one.points]
    if not points:
        return ""
    height, left, right, top, bottom = 250, 46, 14, 22, 36
    x_high = max(x for x, _ in points) or 1.0
    x_low = 0.0 if from_zero else min(x for x, _ in points)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    margin = (y_high - y_low) * 0.06 or 0.5
    y_low, y_high = y_low - margin, y_high + margin

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (WIDTH - left - right) * (x - x_low) / (x_high - x_low)
        return across, top + (height - top - bottom) * (1 - (y - y_low) / (y_high - y_low))

    parts = []
    for tick in ticks(y_low, y_high):
        y = at(x_low, tick)[1]
        parts.append(
            f'<path class="grid" d="M{left} {y:.1f}H{WIDTH - right}"/>'
            f'<text x="{left - 6}" y="{y:.1f}" dy="4" text-anchor="end">{tick:g}</text>'
        )
    for tick in ticks(x_low, x_high):
        parts.append(f'<text x="{at(tick, y_low)[0]:.1f}" y="{height - 20}" text-anchor="middle">{tick:g}</text>')
    parts.append(
        f'<text class="axis" x="{WIDTH - right}" y="{height - 4}" text-anchor="end">{escape(x_name)}</text>'
        f'<text class="axis" x="0" y="11">{escape(y_name)}</text>'
    )
    for one in series:
        placed = [at(x, y) for x, y in one.points]
        parts.append(stroke(one.colour, "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)))
        parts += [shape(one.colour, *place) for place in (placed if marks else placed[-1:])]
    words = "; ".join(_told(one) for one in series)
    names = [(one.colour, one.name) for one in series]
    return framed(height, title, words, "".join(parts)) + legend(names, lines=True)


def _told(one: Series) -> str:
    last = f"{one.points[-1][1]:.3f}"
    return f"{one.name}: from {one.points[0][1]:.3f} to {last}" if len(one.points) > 1 else f"{one.name}: {last}"


def smooth(points: Sequence[tuple[float, float]], window: int = 7) -> list[tuple[float, float]]:
    """Mean of each point with its neighbours, for a noisy training loss."""
    half = window // 2
    found = []
    for place, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, place - half) : place + half + 1]]
        found.append((x, sum(near) / len(near)))
    return found
