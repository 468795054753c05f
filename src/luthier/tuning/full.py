"""Full fine-tuning: every weight of the model is trained.

The tuning holds its own copy of each parameter (a tied one once) and the base keeps the original, so
that other tunings on the same base, and `detach`, see it bit for bit. While the tuning is in use the
modules point at the copies.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.nn import Parameter

from luthier.models.base import BaseModel
from luthier.tuning.method import Defaults


@dataclass(frozen=True)
class Full:
    """Train all parameters; 16-bit weights keep fp32 masters in the optimizer."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    defaults: ClassVar[Defaults] = Defaults(learning_rate=5e-5)

    method: Literal["full"] = "full"

    def attach(self, base: BaseModel, name: str, generator: torch.Generator) -> None:
        """Substitute a trainable copy for every parameter: the output is the base's until trained."""
        base.grafts.substitute(
            name, {key: Parameter(original.detach().clone()) for key, original in base.grafts.originals.items()}
        )

    def virtual_tokens(self) -> int:
        """None."""
        return 0

    def peft_config(self, base: BaseModel, name: str) -> None:
        """PEFT has no full fine-tuning."""
        return None

    def to_file(self, base: BaseModel, owned: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's own parameter names."""
        return dict(owned)

    def from_file(self, base: BaseModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's own parameter names."""
        return dict(tensors)
