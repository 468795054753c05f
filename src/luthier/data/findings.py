"""Finding: one kind of defect in one split, and how such are made from the rows in which it was seen."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One kind of defect in one split: how many rows, which, an example, and what to do."""

    kind: str
    level: Level
    split: str
    count: int
    rows: tuple[str, ...]
    example: str
    advice: str


def finding(kind: str, level: Level, split: str, rows: Sequence[str], example: str, advice: str) -> list[Finding]:
    """A finding where there are rows, else nothing."""
    if not rows:
        return []
    shown = example if len(example) <= 200 else example[:197] + "..."
    return [Finding(kind, level, split, len(rows), tuple(rows), shown, advice)]


def errors(found: Iterable[Finding]) -> list[Finding]:
    """Those that stop a run."""
    return [one for one in found if one.level == "error"]
