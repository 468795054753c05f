"""Selective fine-tuning: some of the model's own parameters are trained, the others stay.

    theta'_i = theta_i + d_i for the chosen i        BitFit (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199)
                                                     trains the biases; LN tuning (https://arxiv.org/abs/2312.11420)
                                                     the layer norms.

As with full fine-tuning the tuning holds its own copies, of what it chose only; while it is in use the modules
point at them. No module is added.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.errors import UserError, nearest
from luthier.models.base import BaseModel
from luthier.models.parts import block_of, embeddings, head, norms
from luthier.tuning import peft
from luthier.tuning.copies import all_places, copies_of, interpolate_copies
from luthier.tuning.method import Defaults, Law, Laws, Method
from luthier.tuning.targets import matches

_LAYER = ".ln_tuning_layers"  # PEFT writes it behind a norm's path
_LAST = re.compile(r"last-(\d+)-blocks?")
# Biases and norms are few numbers of about unit size: they need larger steps than matrices.
_SMALL, _LARGE = Defaults(learning_rate=2e-3), Defaults(learning_rate=3e-4)


@dataclass(frozen=True)
class Selective(Method):
    """Train some of the model's own parameters.

    `targets` is `layernorm`, `bias` (BitFit), `embeddings`, `head`, `last-2-blocks` (of each stack), a shell pattern or
    regular expression over parameter names, the end of one, or a list of these. Where embeddings and head are one
    tensor, choosing one side needs `untie`, which gives it its own copy.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    peft_type: ClassVar[str] = "LN_TUNING"
    laws: ClassVar[Laws] = Laws(
        identity_at_start=Law(True, "the copies are equal to the originals"),
        merge=Law(False, "its weights stand in the base's place already; there is nothing to fold in"),
        mixed_batches=Law(False, "it replaces whole weights, for every row of a batch"),
    )

    method: Literal["selective"] = "selective"
    targets: str | list[str] = "layernorm"
    untie: bool = False

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("targets is empty; name something to train, for example layernorm")

    @property
    def defaults(self) -> Defaults:
        """Larger steps for biases and norms than for matrices."""
        return _SMALL if set(self._words()) <= {"bias", "layernorm"} else _LARGE

    def _words(self) -> list[str]:
        return [self.targets] if isinstance(self.targets, str) else list(self.targets)

    def attach(self, base: BaseModel, name: str, generator: torch.Generator) -> None:
        """Substitute a trainable copy for every chosen parameter."""
        chosen = {place for word in self._words() for place in _chosen(base, word)}
        base.grafts.substitute(name, *copies_of(base, chosen, self.untie))

    def toward_base(self, base: BaseModel, name: str, share: float) -> None:
        """Interpolate the copies."""
        interpolate_copies(base, name, share)

    def peft_config(self, base: BaseModel, name: str) -> dict[str, Any] | None:
        """A PEFT LNTuningConfig where whole norms and nothing else are trained."""
        modules = _whole_norms(base, base.grafts.owned(name))
        return peft.header(base, self.peft_type) | {"target_modules": modules} if modules else None

    @classmethod
    def from_peft(cls, base: BaseModel, config: Mapping[str, Any]) -> "Selective":
        """The selection that a PEFT LNTuningConfig describes; each module trains its own copy."""
        peft.refuse_others(config, {"target_modules", "exclude_modules"})
        modules = peft.chosen_modules(base, config, (nn.Module,))
        places = [place for place in all_places(base) if place.rpartition(".")[0] in modules]
        return cls(targets=places, untie=True)

    def to_file(self, base: BaseModel, name: str) -> dict[str, Tensor]:
        """PEFT's keys for norms, the model's own parameter names otherwise."""
        owned = base.grafts.owned(name)
        if not _whole_norms(base, owned):
            return dict(owned)
        split = {key: key.rpartition(".") for key in owned}
        return {f"{peft.PREFIX}{split[key][0]}{_LAYER}.{split[key][2]}": tensor for key, tensor in owned.items()}

    def from_file(self, base: BaseModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse."""
        return {key.removeprefix(peft.PREFIX).replace(f"{_LAYER}.", "."): one for key, one in tensors.items()}


def _chosen(base: BaseModel, word: str) -> list[str]:
    """The places of parameters that a word or pattern means; raises UserError for none."""
    places = all_places(base)
    owner = {place: place.rpartition(".")[0] for place in places}
    if word == "embeddings":
        tables = {places[f"{path}.weight"] for path in embeddings(base)}
        outside = {f"{path}.weight" for path in head(base)}
        found = [place for place, key in places.items() if key in tables and place not in outside]
    elif word == "head":
        heads = head(base)
        found = [place for place in places if owner[place] in heads]
    elif word == "bias":
        found = [place for place in places if place.rpartition(".")[2] == "bias"]
    elif word == "layernorm":
        layers = norms(base)
        found = [place for place in places if owner[place] in layers]
    elif last := _LAST.fullmatch(word):
        standing = {place: block_of(base, place) for place in places}
        found = [place for place, at in standing.items() if at and at[0] >= at[1] - int(last[1])]
    else:
        found = [place for place in places if matches(word, place) or matches(word, owner[place])]
    if not found:
        raise UserError(_nothing(base, word, list(places)))
    return found


def _nothing(base: BaseModel, word: str, places: list[str]) -> str:
    said = f"This {base.family} model has no biases" if word == "bias" else f"{word!r} is nothing to train here"
    close = "" if word == "bias" else f" {nearest(word, ['bias', 'embeddings', 'head', 'layernorm', *places])}"
    return (
        f"{said}.{close} It has layernorm ({len(norms(base))} norms), embeddings, head, last-K-blocks (of {base.blocks}), "
        f"and parameters such as {', '.join(dict.fromkeys(places[len(places) // 2 :][:3]))}."
    )


def _whole_norms(base: BaseModel, owned: Mapping[str, Tensor]) -> list[str]:
    """The norms that own is made of, all of each; none where there is anything else."""
    modules = sorted({key.rpartition(".")[0] for key in owned})
    whole = {place for place in all_places(base) if place.rpartition(".")[0] in modules}
    return modules if whole == set(owned) and norms(base).keys() >= set(modules) else []
