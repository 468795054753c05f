"""The contract of a method, and what follows from it for all of them.

A method is a frozen dataclass; its fields are the recipe's keys. It says how to graft itself on a
base; what it owns, how it is counted, saved, loaded and removed follows from the grafts.
"""

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import Parameter

from luthier.errors import UserError, nearest
from luthier.models.base import BaseModel


@dataclass(frozen=True)
class Defaults:
    """Training settings that suit a method where the recipe is silent."""

    learning_rate: float
    weight_decay: float = 0.0


@runtime_checkable
class Method(Protocol):
    """How a base is adapted by training something."""

    defaults: ClassVar[Defaults]

    @property
    def method(self) -> str:
        """The recipe's word for this method."""

    def attach(self, base: BaseModel, name: str, generator: torch.Generator) -> None:
        """Graft this method on `base` under `name`; new weights are drawn from `generator`."""

    def virtual_tokens(self) -> int:
        """Positions the method takes in front of every row."""

    def peft_config(self, base: BaseModel, name: str) -> dict[str, Any] | None:
        """The adapter_config.json PEFT reads, or None where PEFT has no such method."""

    def to_file(self, base: BaseModel, owned: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Owned tensors by the key they have in the file."""

    def from_file(self, base: BaseModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of `to_file`."""


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


def match_modules(
    base: BaseModel, pattern: str | list[str], kinds: tuple[type[nn.Module], ...]
) -> dict[str, nn.Module]:
    """Modules of the base that a target pattern means, by path.

    `all-linear` is every linear but the output head; otherwise a pattern is a shell pattern (``*.q_proj``),
    a regular expression that matches the whole path, or a module's last name (``q_proj``).
    Raises UserError for a pattern that matches nothing, naming near misses.
    """
    candidates = {path: module for path, module in base.grafts.modules.items() if isinstance(module, kinds)}
    head = base.model.get_output_embeddings()
    inner = {path: module for path, module in candidates.items() if module is not getattr(head, "base", head)}
    if pattern == "all-linear":
        return inner
    chosen: dict[str, nn.Module] = {}
    for one in [pattern] if isinstance(pattern, str) else pattern:
        found = {path: module for path, module in candidates.items() if _matches(one, path)}
        if not found:
            endings = {path.rpartition(".")[2] for path in candidates}
            raise UserError(
                f"The target pattern {one!r} matches no module of this {base.family} model. "
                f"{nearest(one, endings)} Its linear modules end in: {', '.join(sorted(endings))}; "
                "`all-linear` takes them all but the output head."
            )
        chosen.update(found)
    return chosen


def _matches(pattern: str, path: str) -> bool:
    if path.rpartition(".")[2] == pattern or fnmatch.fnmatchcase(path, pattern):
        return True
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error:
        return False
