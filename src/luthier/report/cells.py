"""Tables as data: the page and the Markdown file write the same ones, so they hold the same numbers."""

from dataclasses import dataclass

from luthier.report.figures import figure
from luthier.report.schema import Score


@dataclass(frozen=True)
class Cell:
    """A text, what stands small beside it, the value that it is sorted by and how it is shaded."""

    text: str
    detail: str = ""
    value: float | str | None = None
    shade: str = ""  # a class of the page's style sheet; the text says the same
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """Named columns and rows of cells; the first cell of a row names it."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __bool__(self) -> bool:
        return bool(self.rows)


NOTHING = Cell("-", value="")


def score_cell(score: Score | None, metric: str) -> Cell:
    """A score with its interval, and its spread over seeds where there is one."""
    if score is None:
        return NOTHING
    detail = f"{figure(score.low, metric)} to {figure(score.high, metric)}"
    if score.spread is not None:
        detail += f", sd {figure(score.spread, metric)}"
    return Cell(figure(score.value, metric), detail, score.value)
