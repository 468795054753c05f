"""Grafts: how a tuning reaches into the one frozen base, and how a batch chooses between tunings.

Before                         after two tunings were grafted on the same linear
  q_proj: Linear                 q_proj: Grafted
                                   base:   Linear          (the same object, untouched)
                                   deltas: {a: Delta, b: Delta}

Three kinds of graft stand here: a *module* graft adds to the output of one module,
``y[s] = f_t(x[s], base(x)[s])``; a *prompt* graft puts vectors before every row; a *substitution*
swaps whole parameters for the tuning's own. What a tuning owns is what it grafted: freezing,
counting, saving and the optimizer all read `owned`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from luthier.errors import UserError
from luthier.models.batch import Segment
from luthier.models.fold import FoldedInPlace
from luthier.models.quantize import QuantizedLinear

EVERYTHING = slice(None)


class Delta(nn.Module):
    """What a module graft computes; subclasses implement ``forward(x, y)`` with y = base(x)."""

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """The base module's fp32 weight, (out, in) for a linear, and bias with this delta folded in; None where no
        weights of the module give the same outputs.
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
        y = self.base(x)
        parts = self.route.parts
        if len(parts) == 1:
            name = parts[0][0]
            delta = self._delta(name)
            return y if delta is None else delta(x, y)
        deltas = [self._delta(name) for name, _ in parts]
        if not any(deltas):
            return y
        # Some blocks flatten (rows, L, D) to (rows L, D) inside: there each row takes L places.
        axis = self.route.axis if x.dim() > 2 else 0
        stretch = x.shape[axis] // parts[-1][1].stop
        pieces = []
        for delta, (_, part) in zip(deltas, parts, strict=True):
            here = (slice(None),) * axis + (slice(part.start * stretch, part.stop * stretch),)
            pieces.append(y[here] if delta is None else delta(x[here], y[here]))
        return torch.cat(pieces, dim=axis)

    def _delta(self, name: str | None) -> nn.Module | None:
        return self.deltas[name] if name is not None and name in self.deltas else None

    @property
    def weight(self) -> Tensor:
        """The base's weight: some model code asks a linear for its dtype."""
        return self.base.weight  # type: ignore[return-value]


class Grafts:
    """All grafts on one model."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.route = Route()
        self.prompts: dict[str, Parameter] = {}  # name -> (P, D)
        self.substitutes: dict[str, dict[str, Parameter]] = {}
        self.names: list[str] = []
        self._substituted: str | None = None
        self._folded: tuple[str, FoldedInPlace] | None = None
        # Where each parameter lives; a tied one lives in several places.
        self.slots: dict[str, list[tuple[nn.Module, str]]] = {}
        self.originals: dict[str, Parameter] = {}
        by_id: dict[int, str] = {}
        for path, module in model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                name = by_id.setdefault(id(parameter), f"{path}.{key}" if path else key)
                self.slots.setdefault(name, []).append((module, key))
                self.originals[name] = parameter
        self.modules: dict[str, nn.Module] = {path: module for path, module in model.named_modules() if path}

    def claim(self, name: str) -> None:
        """Reserve the name of a new tuning."""
        if name in self.names:
            raise UserError(f"A tuning named {name!r} is attached already. Attached: {', '.join(self.names)}.")
        if not name or not all(sign.isalnum() or sign in "-_" for sign in name):
            raise UserError(f"The tuning name {name!r} may hold letters, digits, '-' and '_' only.")
        self.names.append(name)

    def graft_module(self, path: str, name: str, delta: Delta) -> None:
        """Add a tuning's delta to the module at `path`."""
        parent, _, key = path.rpartition(".")
        owner = self.modules[parent] if parent else self.model
        current = getattr(owner, key)
        if not isinstance(current, Grafted):
            current = Grafted(current, self.route)
            setattr(owner, key, current)
        current.deltas[name] = delta

    def graft_prompt(self, name: str, vectors: Parameter) -> None:
        """Put (P, D) vectors before every row of this tuning (of the encoder, where there is one)."""
        self.prompts[name] = vectors

    def substitute(self, name: str, parameters: Mapping[str, Parameter]) -> None:
        """Use these parameters in place of the base's while this tuning is active; none of them may be in 4 bits."""
        packed = {
            f"{path}.weight" for path, module in self.modules.items() if isinstance(module, QuantizedLinear)
        } & parameters.keys()
        if packed:
            raise UserError(
                f"The tuning {name!r} trains {len(packed)} weights that the base keeps in 4 bits (base.quantize: nf4), "
                f"{min(packed)} for one, and 4-bit numbers cannot be trained. Train what is not quantized (norms, "
                "biases, embeddings), or beside the weights (lora), or take base.quantize out."
            )
        self.substitutes[name] = dict(parameters)

    def owned(self, name: str) -> dict[str, Parameter]:
        """Everything the tuning `name` trains and saves, by a stable key."""
        self._known(name)
        parameters: dict[str, Parameter] = {}
        for path, grafted in self._grafted():
            if name in grafted.deltas:
                for key, parameter in grafted.deltas[name].named_parameters():
                    parameters[f"{path}.{key}"] = parameter
        if name in self.prompts:
            parameters["prompt_embeddings"] = self.prompts[name]
        parameters.update(self.substitutes.get(name, {}))
        return parameters

    def deltas(self, name: str) -> dict[str, tuple[nn.Module, Delta]]:
        """The modules that a tuning grafted on, each with its delta, by path."""
        self._known(name)
        found = [(path, grafted) for path, grafted in self._grafted() if name in grafted.deltas]
        return {path: (grafted.base, grafted.deltas[name]) for path, grafted in found}  # type: ignore[misc]

    def use(self, name: str | None, merged: bool = False) -> None:
        """Make one tuning (None: the bare base) answer every row; moves pointers, not weights.

        With `merged` the sums of weights and deltas stand in the modules until the next `use`; the originals are kept.
        """
        if name is not None:
            self._known(name)
        self._unfold()
        self._place(name if name in self.substitutes else None)
        self.route.one(name)
        if merged and name is not None:
            self._folded = name, FoldedInPlace(self, name)
            self.route.one(None)

    def use_segments(self, segments: tuple[Segment, ...], parts: tuple[slice, ...], axis: int) -> None:
        """Give each segment of a batch to its own tuning; `parts` are its slices along `axis`."""
        names = {segment.name for segment in segments}
        swapped = sorted(name for name in names if name in self.substitutes)
        if swapped and len(names) > 1:
            raise UserError(
                f"The tuning {swapped[0]!r} replaces whole weights, so its rows need a batch of their own; "
                f"this one also holds rows of {', '.join(sorted(str(name) for name in names - {swapped[0]}))}."
            )
        self._unfold()
        self._place(swapped[0] if swapped else None)
        self.route.parts = tuple((segment.name, part) for segment, part in zip(segments, parts, strict=True))
        self.route.axis = axis

    def remove(self, name: str) -> None:
        """Take a tuning away; the base is bit for bit what it was."""
        self._known(name)
        if any(part[0] == name for part in self.route.parts) or (self._folded and self._folded[0] == name):
            self.use(None)
        for path, grafted in self._grafted():
            if name in grafted.deltas:
                del grafted.deltas[name]
            if not grafted.deltas:
                parent, _, key = path.rpartition(".")
                setattr(self.modules[parent] if parent else self.model, key, grafted.base)
        self.prompts.pop(name, None)
        self.substitutes.pop(name, None)
        self.names.remove(name)

    def _unfold(self) -> None:
        if self._folded:
            self._folded[1].restore()
            self._folded = None

    def _place(self, name: str | None) -> None:
        if self._substituted == name:
            return
        for key in self.substitutes.get(self._substituted or "", {}):
            self._point(key, self.originals[key])
        for key, parameter in self.substitutes.get(name or "", {}).items():
            self._point(key, parameter)
        self._substituted = name

    def _point(self, name: str, parameter: Parameter) -> None:
        for module, key in self.slots[name]:
            module._parameters[key] = parameter

    def _grafted(self) -> list[tuple[str, Grafted]]:
        found = []
        for path in self.modules:
            parent, _, key = path.rpartition(".")
            current = getattr(self.modules[parent] if parent else self.model, key, None)
            if isinstance(current, Grafted):
                found.append((path, current))
        return found

    def _known(self, name: str) -> None:
        if name not in self.names:
            attached = ", ".join(self.names) or "none"
            raise UserError(f"No tuning named {name!r} is attached. Attached: {attached}.")
