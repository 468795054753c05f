"""Zero-shot and few-shot prompting (Brown et al. 2020) and the choice of a prompt: the base as it is, nothing trained."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

MOST_SHOTS = 512  # what `shots: full` tries


@dataclass(frozen=True)
class ZeroShot:
    """Ask the base directly."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    method: Literal["zero_shot"] = "zero_shot"

    def shot_count(self) -> int:
        """No example is shown."""
        return 0


@dataclass(frozen=True)
class FewShot:
    """Show `shots` training examples before the question, as chat turns for a chat model.

    `selection` is `random`, the same for all questions by seed, or `similar`: for each question those whose prompts are most
    like it by BM25 (Robertson and Zaragoza 2009), the likest last. `draw` numbers the random choice: others show
    other examples. `shots: full` shows as many as fit (at most 512). In a recipe `shots` and `draw` may be lists, each value a tuning of its own.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    method: Literal["few_shot"] = "few_shot"
    shots: int | Literal["full"] = 2
    selection: Literal["random", "similar"] = "random"
    draw: int = 0

    def __post_init__(self) -> None:
        if self.shots != "full" and self.shots < 1:
            raise ValueError(f"shots is {self.shots}; few_shot needs at least 1 (or use zero_shot)")
        if self.draw < 0:
            raise ValueError(f"draw is {self.draw}; it must not be negative")

    def shot_count(self) -> int:
        """As many examples as asked for; fewer where they do not fit the context."""
        return MOST_SHOTS if self.shots == "full" else self.shots


@dataclass(frozen=True)
class BestTemplate:
    """Ask the base with the template that is best on validation.

    Each of the task's templates, or of `templates`, answers the first `rows` validation rows (0: all); the one with the best
    main metric answers the test.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    method: Literal["best_template"] = "best_template"
    templates: list[str] = field(default_factory=list)
    rows: int = 50

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise ValueError(f"rows is {self.rows}; it must be at least 1, or 0 for all validation rows")

    def shot_count(self) -> int:
        """No example is shown."""
        return 0
