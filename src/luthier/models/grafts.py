"""Grafts: how a tuning reaches into the one frozen base, and how a batch chooses between tunings.

Four kinds: a *module* graft changes what one module gives (`grafted.py`); a *prompt* graft puts vectors
before every row; a *prefix* graft puts keys and values before every row, in every layer (`prefix.py`); a
*substitution* swaps whole parameters for the tuning's own. What a tuning owns is what it grafted: freezing,
counting, saving and the optimizer all read `owned`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import Parameter

from luthier.errors import UserError
from luthier.files import plain_name
from luthier.models.batch import Segment
from luthier.models.fold import FoldedInPlace
from luthier.models.grafted import Delta, Grafted, Route
from luthier.models.prefix import Prefix, Prefixes
from luthier.models.quantize import QuantizedLinear


class Grafts:
    """All grafts on one model."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.route = Route()
        self.prompts: dict[str, Parameter] = {}  # name -> (P, D)
        self.prefixes: dict[str, Prefix] = {}
        self.substitutes: dict[str, dict[str, Parameter]] = {}
        self._alone: dict[str, str] = {}  # name -> a module it grafted on that works for all rows at once
        self._where: dict[str, dict[str, Sequence[str]]] = {}
        self.names: list[str] = []
        self._substituted: str | None = None
        self._folded: tuple[str, FoldedInPlace] | None = None
        # Where each parameter lives, by path; a tied one lives in several places and is named by the first.
        self.slots: dict[str, list[str]] = {}
        self.originals: dict[str, Parameter] = {}
        self._places: dict[str, tuple[nn.Module, str, Parameter]] = {}
        by_id: dict[int, str] = {}
        for path, module in model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                place = f"{path}.{key}" if path else key
                name = by_id.setdefault(id(parameter), place)
                self.slots.setdefault(name, []).append(place)
                self.originals[name] = parameter
                self._places[place] = (module, key, parameter)
        self.modules: dict[str, nn.Module] = {path: module for path, module in model.named_modules() if path}

    def claim(self, name: str) -> None:
        """Reserve the name of a new tuning."""
        if name in self.names:
            raise UserError(f"A tuning named {name!r} is attached already. Attached: {', '.join(self.names)}.")
        if not plain_name(name.replace("@", "-")):  # NAME@STEP is a snapshot of NAME
            raise UserError(f"The tuning name {name!r} may hold letters, digits, '-' and '_' only.")
        self.names.append(name)

    def graft_module(self, path: str, name: str, delta: Delta, shared: bool = False) -> None:
        """Add a tuning's delta to the module at `path`; a `shared` one works for all rows of a batch at once."""
        if shared:
            self._alone[name] = path
        parent, _, key = path.rpartition(".")
        owner = self.modules[parent] if parent else self.model
        current = getattr(owner, key)
        if not isinstance(current, Grafted):
            current = Grafted(current, self.route)
            setattr(owner, key, current)
        current.add(name, delta)

    def graft_prompt(self, name: str, vectors: Parameter) -> None:
        """Put (P, D) vectors before every row of this tuning (of the encoder, where there is one)."""
        self.prompts[name] = vectors

    def graft_prefix(self, name: str, prefix: Prefix) -> None:
        """Put keys and values before every row of this tuning (of the decoder, where there is an encoder)."""
        self.prefixes[name] = prefix

    def substitute(
        self, name: str, parameters: Mapping[str, Parameter], places: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        """Use these parameters in place of the base's while this tuning is active.

        A parameter stands in all places of the base's one by its name, or where `places` says; none may be in 4 bits.
        """
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
        self._where[name] = {key: (places or {}).get(key) or self.slots[key] for key in parameters}

    def owned(self, name: str) -> dict[str, Parameter]:
        """Everything the tuning `name` trains and saves, by a stable key."""
        self._known(name)
        parameters: dict[str, Parameter] = {}
        for path, grafted in self._grafted():
            if (delta := grafted.delta(name)) is not None:
                for key, parameter in delta.named_parameters():
                    parameters[f"{path}.{key}"] = parameter
        if name in self.prompts:
            parameters["prompt_embeddings"] = self.prompts[name]
        if name in self.prefixes:
            parameters.update(self.prefixes[name].named_parameters())
        parameters.update(self.substitutes.get(name, {}))
        return parameters

    def deltas(self, name: str) -> dict[str, tuple[nn.Module, Delta]]:
        """The modules that a tuning grafted on, each with its delta, by path."""
        self._known(name)
        found = [(path, grafted.base, grafted.delta(name)) for path, grafted in self._grafted()]
        return {path: (module, delta) for path, module, delta in found if delta is not None}

    def derive(self, dtype: torch.dtype) -> None:
        """Make what the tunings in use derive from their parameters once (`standing_still`)."""
        for _, grafted in self._grafted():
            grafted.derive(dtype)

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
        """Give each segment of a batch to its own tuning; `parts` are its slices along `axis`.

        Raises UserError for a tuning that is not attached, and where tunings cannot share a batch.
        """
        names = {segment.name for segment in segments}
        for name in names - {None}:
            self._known(str(name))
        starts = [0, *(segment.stop for segment in segments)]
        assert starts[:-1] == [segment.start for segment in segments] and starts == sorted(starts), (
            "segments follow one another from row 0 on"
        )
        swapped = sorted(name for name in names if name in self.substitutes)
        if swapped and len(names) > 1:
            raise UserError(
                f"The tuning {swapped[0]!r} replaces whole weights, so its rows need a batch of their own; "
                f"this one also holds rows of {', '.join(sorted(str(name) for name in names - {swapped[0]}))}."
            )
        alone = sorted(name for name in names if name in self._alone)
        if alone and len(names) > 1:
            raise UserError(
                f"The tuning {alone[0]!r} changes {self._alone[alone[0]]}, which works for all rows of a batch at once, so "
                "its rows need a batch of their own."
            )
        self._unfold()
        self._place(swapped[0] if swapped else None)
        self.route.parts = tuple((segment.name, part) for segment, part in zip(segments, parts, strict=True))
        self.route.axis = axis

    def adopt(self) -> None:
        """Take the parameters that now stand in the modules for the base's and the tuning's in use: others replaced them."""
        for place, (module, key, _) in self._places.items():
            self._places[place] = (module, key, module._parameters[key])  # type: ignore[assignment]
        for name, places in self.slots.items():
            self.originals[name] = self._places[places[0]][2]
        for key, where in self._where.get(self._substituted or "", {}).items():
            self.substitutes[self._substituted or ""][key] = self._places[where[0]][2]

    @contextmanager
    def bare(self) -> Iterator[None]:
        """The base without any tuning; what was in use before is so again afterwards."""
        parts, axis, substituted = self.route.parts, self.route.axis, self._substituted
        folded = self._folded and self._folded[0]
        self.use(None)
        try:
            yield
        finally:
            if folded:
                self.use(folded, merged=True)
            else:
                self.route.parts, self.route.axis = parts, axis
                self._place(substituted)

    def name_of(self, row: int, segments: tuple[Segment, ...]) -> str | None:
        """The tuning that a row of a batch belongs to."""
        if segments:
            return next(segment.name for segment in segments if segment.start <= row < segment.stop)
        assert len(self.route.parts) == 1, "rows of a mixed batch need their segments"
        return self.route.parts[0][0]

    def prefixes_of(self, rows: Sequence[int], segments: tuple[Segment, ...]) -> Prefixes | None:
        """The prefixes of these rows; None where no row has one."""
        if not self.prefixes:
            return None
        names = [self.name_of(row, segments) for row in rows]
        states = {name: self.prefixes[name]() for name in set(names) if name in self.prefixes}
        return Prefixes(tuple(states.get(name or "") for name in names)) if states else None

    def remove(self, name: str) -> None:
        """Take a tuning away; the base is bit for bit what it was."""
        self._known(name)
        if any(part[0] == name for part in self.route.parts) or (self._folded and self._folded[0] == name):
            self.use(None)
        for path, grafted in self._grafted():
            grafted.discard(name)
            if not grafted.deltas:
                parent, _, key = path.rpartition(".")
                setattr(self.modules[parent] if parent else self.model, key, grafted.base)
        self._alone.pop(name, None)
        self.prompts.pop(name, None)
        self.prefixes.pop(name, None)
        self.substitutes.pop(name, None)
        self._where.pop(name, None)
        self.names.remove(name)

    def _unfold(self) -> None:
        if self._folded:
            self._folded[1].restore()
            self._folded = None

    def _place(self, name: str | None) -> None:
        if self._substituted == name:
            return
        for places in self._where.get(self._substituted or "", {}).values():
            for place in places:
                self._point(place, self._places[place][2])
        for key, places in self._where.get(name or "", {}).items():
            for place in places:
                self._point(place, self.substitutes[name or ""][key])
        self._substituted = name

    def _point(self, place: str, parameter: Parameter) -> None:
        module, key, _ = self._places[place]
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
