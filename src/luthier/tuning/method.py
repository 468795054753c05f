"""The contract of a method, and what follows from it for all of them.

A method is a frozen dataclass; its fields are the recipe's keys. It says how to graft itself on a
base; what it owns, how it is counted, saved, loaded and removed follows from the grafts. Where PEFT has the method,
it also says how PEFT writes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch.nn import Parameter

from luthier.errors import UserError
from luthier.models.base import BaseModel


@dataclass(frozen=True)
class Defaults:
    """Training settings that suit a method where the recipe is silent."""

    learning_rate: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Law:
    """Whether a law holds for a method, and why (not)."""

    holds: bool
    why: str


@dataclass(frozen=True)
class Laws:
    """The laws that hold for some methods only; the law suite tests each where it holds.

    For all methods: only what is owned moves, detaching restores the base's bits, saving and loading restore the
    tuning's, a row does not depend on its neighbours, micro-batches are one batch, the count follows a formula.
    """

    identity_at_start: Law  # a fresh one gives the base's bits
    merge: Law  # its outputs are those of the base with other weights
    mixed_batches: Law  # its rows may share a batch with rows of other tunings


@runtime_checkable
class Method(Protocol):
    """How a base is adapted by training something."""

    @property
    def defaults(self) -> Defaults:
        """Training settings that suit it."""

    @property
    def laws(self) -> Laws:
        """Which laws hold for it, and why."""

    @property
    def method(self) -> str:
        """The recipe's word for this method."""

    def attach(self, base: BaseModel, name: str, generator: torch.Generator) -> None:
        """Graft this method on `base` under `name`; new weights are drawn from `generator`."""

    def virtual_tokens(self) -> int:
        """Positions the method takes in front of every row."""
        return 0

    def saved(self) -> "Method":
        """The method that its file holds: itself, unless training needs more than use does."""
        return self

    def peft_config(self, base: BaseModel, name: str) -> dict[str, Any] | None:
        """The adapter_config.json PEFT reads, or None where PEFT has no such method."""
        return None

    def to_file(self, base: BaseModel, name: str) -> dict[str, torch.Tensor]:
        """The tensors of the attached tuning `name`, by the key they have in the file: without PEFT's, their own."""
        return dict(base.grafts.owned(name))

    def from_file(self, base: BaseModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A file's tensors by the key of the parameter they belong to: the inverse."""
        return dict(tensors)

    def toward_base(self, base: BaseModel, name: str, share: float) -> None:
        """Leave `share` of the change that the attached tuning `name` makes: W + share (W' - W).

        Raises UserError for a method that changes no weights and adds to no outputs.
        """
        raise UserError(
            f"{self.method} changes no weights, so there is nothing between the base and it to interpolate."
        )


@runtime_checkable
class Prompting(Protocol):
    """How a base is used as it is: nothing is trained."""

    @property
    def method(self) -> str:
        """The recipe's word for this method."""

    def shot_count(self) -> int:
        """Examples shown in the prompt."""


def attach(base: BaseModel, name: str, method: Method, seed: int = 0) -> None:
    """Graft a fresh tuning on the base; it is not yet in use. The base's own weights stay as they are."""
    base.grafts.claim(name)
    try:
        with base.grafts.bare():  # a method may start from the base's weights, which another tuning may stand in for
            method.attach(base, name, torch.Generator().manual_seed(seed))
    except BaseException:
        base.grafts.remove(name)
        raise
    base.methods[name] = method


def detach(base: BaseModel, name: str) -> None:
    """Take a tuning away; the base is bit for bit what it was."""
    base.grafts.remove(name)
    base.methods.pop(name, None)


def parameters(base: BaseModel, name: str) -> dict[str, Parameter]:
    """What the tuning owns, by a stable key: the one list that training, counting and saving read."""
    return base.grafts.owned(name)
