"""Interpolation: the weights between the base's and those of another tuning (Wortsman et al. 2022, https://arxiv.org/abs/2109.01903).

    W_c = W + c (W' - W)        c = 0 is the base, c = 1 the tuning

Nothing is trained. Most of what a tuning gains is often kept where much of what it forgot comes back; `report.json` has both for
each c. What a tuning adds to the outputs (LoRA's product, an adapter's) is multiplied by c.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class Interpolation:
    """Take the tuning `of`, which stands before this one in the recipe, back towards the base: `share` of its change is left."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    of: str
    method: Literal["interpolate"] = "interpolate"
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be from 0 (the base) to 1 (the tuning)")
