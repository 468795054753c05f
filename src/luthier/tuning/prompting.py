"""Zero-shot and few-shot prompting (Brown et al. 2020): the base as it is, nothing trained."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal


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
    other examples. In a recipe `shots` and `draw` may be lists, each value a tuning of its own.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    method: Literal["few_shot"] = "few_shot"
    shots: int = 2
    selection: Literal["random", "similar"] = "random"
    draw: int = 0

    def __post_init__(self) -> None:
        if self.shots < 1:
            raise ValueError(f"shots is {self.shots}; few_shot needs at least 1 (or use zero_shot)")
        if self.draw < 0:
            raise ValueError(f"draw is {self.draw}; it must not be negative")

    def shot_count(self) -> int:
        """As many examples as asked for; fewer where they do not fit the context."""
        return self.shots
