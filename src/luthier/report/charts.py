"""Charts as inline SVG that follow the page's colours: no script, no outside file, a text for every picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 440


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
    """Horizontal bars with 95 % intervals, from zero; values as shown (shares already x100)."""
    top = max((row.high for row in rows), default=1.0) or 1.0
    left, right, pitch = 112, 50, 30
    span = WIDTH - left - right
    parts = []
    for place, row in enumerate(rows):
        y = 14 + place * pitch
        x, low, high = (left + span * max(amount, 0) / top for amount in (row.value, row.low, row.high))
        parts.append(
            f'<text x="{left - 10}" y="{y + 13}" text-anchor="end">{escape(row.label)}</text>'
            f'<rect class="s{row.colour % 6} bar" x="{left}" y="{y}" width="{max(x - left, 0.5):.1f}" height="18" rx="3"/>'
            f'<path class="whisker" d="M{low:.1f} {y + 9}H{high:.1f}M{low:.1f} {y + 4}v10M{high:.1f} {y + 4}v10"/>'
            f'<text x="{high + 8:.1f}" y="{y + 13}">{row.value:.{row.digits}f}</text>'
        )
    words = "; ".join(
        f"{row.label} {row.value:.{row.digits}f} (95 % from {row.low:.{row.digits}f} to {row.high:.{row.digits}f})"
        for row in rows
    )
    return _svg(14 + len(rows) * pitch, title, words, "".join(parts))


@dataclass(frozen=True)
class Series:
    """A named line of (x, y) points."""

    colour: int
    name: str
    points: Sequence[tuple[float, float]]


def lines(series: Sequence[Series], title: str, x_name: str, y_name: str) -> str:
    """One line for each series, with a legend."""
    points = [point for one in series for point in one.points]
    if not points:
        return ""
    height, left, right, top, bottom = 260, 52, 16, 14, 36
    x_high = max(x for x, _ in points) or 1.0
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    margin = (y_high - y_low) * 0.06 or 0.5
    y_low, y_high = y_low - margin, y_high + margin

    def at(x: float, y: float) -> str:
        across = left + (WIDTH - left - right) * x / x_high
        up = top + (height - top - bottom) * (1 - (y - y_low) / (y_high - y_low))
        return f"{across:.1f} {up:.1f}"

    parts = []
    for tick in _ticks(y_low, y_high):
        y = at(0, tick).split()[1]
        parts.append(
            f'<path class="grid" d="M{left} {y}H{WIDTH - right}"/>'
            f'<text x="{left - 6}" y="{y}" dy="4" text-anchor="end">{tick:g}</text>'
        )
    for tick in _ticks(0, x_high):
        x = at(tick, y_low).split()[0]
        parts.append(f'<text x="{x}" y="{height - 20}" text-anchor="middle">{tick:g}</text>')
    parts.append(
        f'<text class="axis" x="{WIDTH - right}" y="{height - 4}" text-anchor="end">{escape(x_name)}</text>'
        f'<text class="axis" x="{left}" y="10">{escape(y_name)}</text>'
    )
    for one in series:
        parts.append(f'<path class="s{one.colour % 6} line" d="M{"L".join(at(x, y) for x, y in one.points)}"/>')
        x, y = at(*one.points[-1]).split()
        parts.append(f'<circle class="s{one.colour % 6} bar" cx="{x}" cy="{y}" r="3.5"/>')
    legend = "".join(f'<span class="key"><i class="s{one.colour % 6}"></i>{escape(one.name)}</span>' for one in series)
    words = "; ".join(f"{one.name}: from {one.points[0][1]:.3f} to {one.points[-1][1]:.3f}" for one in series)
    return f'{_svg(height, title, words, "".join(parts))}<p class="legend">{legend}</p>'


def smooth(points: Sequence[tuple[float, float]], window: int = 7) -> list[tuple[float, float]]:
    """Mean of each point with its neighbours, for a noisy training loss."""
    half = window // 2
    found = []
    for place, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, place - half) : place + half + 1]]
        found.append((x, sum(near) / len(near)))
    return found


def _ticks(low: float, high: float) -> list[float]:
    span = high - low
    raw = span / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first = math.ceil(low / step)
    return [round(number * step, 10) for number in range(first, math.floor(high / step) + 1)]


def _svg(height: int, title: str, words: str, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(f"{title}: {words}")}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )
