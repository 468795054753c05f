"""A module of the base with the deltas that tunings grafted on it.

Before                         after two tunings were grafted on the same linear
  q_proj: Linear                 q_proj: Grafted
                                   base:   Linear          (the same object, untouched)
                                   deltas: {a: Delta, b: Delta}

    y[s] = f_t(x[s], base(e_t(x))[s])       for each segment s of rows and its tuning t
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from luthier.models.products import Product, apply_alone, hooked, plain

EVERYTHING = slice(None)

# What deltas have derived from their parameters, while nothing changes these: see `standing_still`.
_derived: ContextVar[dict[tuple[int, Any], Any] | None] = ContextVar("derived", default=None)
Derived = TypeVar("Derived")


@contextmanager
def standing_still() -> Iterator[None]:
    """Within it no parameter changes and nothing is trained: what follows from a delta's parameters is derived once.

    Within another one it is a part of that.
    """
    known = _derived.get()
    token = _derived.set({} if known is None else known)
    try:
        yield
    finally:
        _derived.reset(token)


class Delta(nn.Module):
    """What a module graft computes; subclasses implement ``forward(x, y)`` with y = base(x)."""

    # Whether the base module reads `enter(x)` in place of x.
    changes_input: ClassVar[bool] = False

    def enter(self, x: Tensor) -> Tensor:
        """What the base module reads in place of x."""
        return x

    def once(self, key: Any, derive: Callable[[], Derived]) -> Derived:
        """What `derive` makes of the parameters; while they stand still, made once for each key."""
        known = _derived.get()
        if known is None or torch.is_grad_enabled():
            return derive()
        if (id(self), key) not in known:
            known[id(self), key] = derive()
        found: Derived = known[id(self), key]
        return found

    def derive(self, dtype: torch.dtype) -> None:
        """Make what is made `once` for activations of this precision: between the tensors of a long pass it would tear holes."""

    def as_product(self, base: nn.Module) -> Product | None:
        """f(x, base(x)) as one product whose gradient is written out, where this delta has one for such a module; else None."""
        return None

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """The base module's fp32 weight, (out, in) for a linear and (vocabulary, D) for an embedding, and bias with this
        delta folded in; None where no weights of the module give the same outputs.
        """
        return None


class Route:
    """Which tunings are active, and which slice of the leading token or row axis each one owns."""

    def __init__(self) -> None:
        self.parts: tuple[tuple[str | None, slice], ...] = ()
        self.axis = 1

    def one(self, name: str | None) -> None:
        """Give every row to one tuning."""
        self.parts = ((name, EVERYTHING),)


class Grafted(nn.Module):
    """A module of the base with the deltas of the tunings that grafted on it."""

    def __init__(self, base: nn.Module, route: Route):
        super().__init__()
        self.base = base
        self.deltas = nn.ModuleDict()
        self.route = route

    def forward(self, x: Tensor) -> Tensor:
        """The base's output with each segment's delta."""
        parts = self.route.parts
        if len(parts) == 1:
            delta = self.delta(parts[0][0])
            if delta is None:
                return self.base(x)
            if (product := delta.as_product(self.base)) is not None:
                return apply_alone(product, x)
            y = self.base(delta.enter(x) if delta.changes_input else x)
            return delta(x, y)
        deltas = [self.delta(name) for name, _ in parts]
        if not any(delta is not None for delta in deltas):
            return self.base(x)
        # Some blocks flatten (rows, L, D) to (rows L, D) inside: there each row takes L places.
        axis = self.route.axis if x.dim() > 2 else 0
        stretch = x.shape[axis] // parts[-1][1].stop
        places = [(slice(None),) * axis + (slice(part.start * stretch, part.stop * stretch),) for _, part in parts]
        pairs = list(zip(deltas, places, strict=True))
        entered = x
        if any(delta is not None and delta.changes_input for delta in deltas):
            entered = torch.cat([x[here] if delta is None else delta.enter(x[here]) for delta, here in pairs], dim=axis)
        y = self.base(entered)
        return torch.cat([y[here] if delta is None else delta(x[here], y[here]) for delta, here in pairs], dim=axis)

    def as_product(self) -> Product | None:
        """The base with the one delta in use as a product; None where rows are mixed, or its gradient is not written out."""
        if len(self.route.parts) > 1:
            return None
        delta = self.delta(self.route.parts[0][0])
        return plain(self.base) if delta is None else delta.as_product(self.base)

    # Keys begin with "t-": a ModuleDict refuses `train`, `half` and its other attributes.

    def add(self, name: str, delta: Delta) -> None:
        """Take in the delta of the tuning `name`."""
        self.deltas[f"t-{name}"] = delta

    def discard(self, name: str) -> None:
        """Drop the delta of the tuning `name`, if there is one."""
        if self.delta(name) is not None:
            del self.deltas[f"t-{name}"]

    def delta(self, name: str | None) -> Delta | None:
        """The delta of the tuning `name`, if there is one."""
        key = f"t-{name}"
        return self.deltas[key] if name is not None and key in self.deltas else None  # type: ignore[return-value]

    def derive(self, dtype: torch.dtype) -> None:
        """Have the deltas in use make what they make once."""
        for name, _ in self.route.parts:
            if (delta := self.delta(name)) is not None:
                delta.derive(dtype)

    def active_parameters(self) -> list[Parameter]:
        """The parameters that the tunings now in use own here, and the base's own."""
        deltas = [self.delta(name) for name, _ in self.route.parts]
        own = [parameter for delta in deltas if delta is not None for parameter in delta.parameters()]
        return [*own, *self.base.parameters()]

    @property
    def weight(self) -> Tensor:
        """The base's weight: some model code asks a linear for its dtype."""
        return self.base.weight  # type: ignore[return-value]


def product_of(module: nn.Module) -> Product | None:
    """A linear, tuned or not, as a product; None where it has no gradient that is written out, and for one with hooks."""
    if not isinstance(module, Grafted):
        return plain(module)
    return None if hooked(module) else module.as_product()
