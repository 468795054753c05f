"""Full fine-tuning: every weight of the model is trained.

The tuning holds its own copy of each parameter (a tied one once) and the base keeps the original, so
that other tunings on the same base, and `detach`, see it bit for bit. While the tuning is in use the
modules point at the copies.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from luthier.models.base import BaseModel
from luthier.tuning.copies import copies_of, interpolate_copies
from luthier.tuning.method import Defaults, Law, Laws, Method


@dataclass(frozen=True)
class Full(Method):
    """Train all parameters; 16-bit weights keep fp32 masters in the optimizer."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    defaults: ClassVar[Defaults] = Defaults(learning_rate=5e-5)
    laws: ClassVar[Laws] = Laws(
        identity_at_start=Law(True, "the copies are equal to the originals"),
        merge=Law(False, "its weights stand in the base's place already; there is nothing to fold in"),
        mixed_batches=Law(False, "it replaces whole weights, for every row of a batch"),
    )

    method: Literal["full"] = "full"

    def attach(self, base: BaseModel, name: str, generator: torch.Generator) -> None:
        """Substitute a trainable copy for every parameter: the output is the base's until trained."""
        every = [place for places in base.grafts.slots.values() for place in places]
        base.grafts.substitute(name, *copies_of(base, set(every), untie=False))

    def toward_base(self, base: BaseModel, name: str, share: float) -> None:
        """Interpolate the copies."""
        interpolate_copies(base, name, share)
