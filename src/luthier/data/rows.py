"""Row: one record of a source."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One record: its id (``file:line``) and its columns by name."""

    id: str
    values: dict[str, Any]
