"""How charts tell tunings apart: by colour, by shape and by dash, so that no one needs to see colours; and their frame."""

import math
from collections.abc import Sequence
from html import escape

WIDTH = 400
COLOURS = 6
_DASHES = ("", "7 4", "2 4", "10 4 2 4")
# Around (0, 0): circle, square, triangle, diamond, cross, upside-down triangle.
_SHAPES = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "M-4-4h8v8h-8z",
    "M0-5.5l5 9.5h-10z",
    "M0-6l5.5 6l-5.5 6l-5.5-6z",
    "M-5-1.7h3.3v-3.3h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3z",
    "M0 5.5l5-9.5h-10z",
)


def colour(place: int) -> str:
    """The style class of the tuning at this place of the report."""
    return f"s{place % COLOURS}"


def shape(place: int, x: float, y: float) -> str:
    """A mark at (x, y); hollow where the shapes begin anew."""
    style = "line hollow" if place // COLOURS % 2 else "bar"
    drawn = _SHAPES[place % COLOURS]
    return f'<path class="{colour(place)} {style}" transform="translate({x:.1f} {y:.1f})" d="{drawn}"/>'


def stroke(place: int, path: str) -> str:
    """A line along a path."""
    dash = _DASHES[place % len(_DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="{colour(place)} line"{dashed} d="{path}"/>'


def legend(names: Sequence[tuple[int, str]], lines: bool = False) -> str:
    """Names behind their marks, for under a chart."""
    keys = []
    for place, name in names:
        sample = (stroke(place, "M1 8H29") if lines else "") + shape(place, 15, 8)
        drawn = f'<svg viewBox="0 0 30 16" class="sample" aria-hidden="true">{sample}</svg>'
        keys.append(f'<span class="key">{drawn}{escape(name)}</span>')
    return f'<p class="legend">{"".join(keys)}</p>'


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two ends, about `most` of them."""
    raw = (high - low) / most
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    return [round(number * step, 10) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def shortened(name: str, most: int = 22) -> str:
    """A label that fits beside a chart: escaped, its middle left out where it is long."""
    if len(name) <= most:
        return escape(name)
    half = most // 2
    return f"<title>{escape(name)}</title>{escape(name[:half] + chr(0x2026) + name[-half:])}"


def framed(height: float, title: str, words: str, body: str) -> str:
    """An SVG picture with its text: `title` names it, `words` says every number that it shows."""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(f"{title}: {words}")}">'
        f"<title>{escape(title)}</title><desc>{escape(words)}</desc>{body}</svg>"
    )
