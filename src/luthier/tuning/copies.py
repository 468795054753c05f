"""A tuning's own copies of parameters of the base, tied ones with care."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch.nn import Parameter

from luthier.errors import UserError
from luthier.models.base import BaseModel
from luthier.tuning.targets import matches

Copies = tuple[dict[str, Parameter], dict[str, Sequence[str]]]  # by key; and in which places each stands


def copies_of(base: BaseModel, places: Collection[str], untie: bool) -> Copies:
    """A trainable copy of every parameter that stands in these places, for `Grafts.substitute`.

    Raises UserError for weights that are stored in few bits, and for one side of a tied parameter unless `untie`
    gives that side a copy of its own.
    """
    copies: dict[str, Parameter] = {}
    where: dict[str, Sequence[str]] = {}
    for key, slots in base.grafts.slots.items():
        chosen = [place for place in slots if place in places]
        if not chosen:
            continue
        original = base.grafts.originals[key]
        if not original.is_floating_point():
            raise UserError(f"{key} is stored in few bits, which cannot be trained. Use `method: lora` on this base.")
        if len(chosen) < len(slots) and not untie:
            others = ", ".join(place for place in slots if place not in chosen)
            raise UserError(
                f"{', '.join(chosen)} is tied to {others}: it is one tensor, and training one side alone would part "
                "them. Choose both (as `selective` does with `targets: [embeddings, head]`), or set `untie: true`, which gives this side "
                f"its own copy of {original.numel():,} numbers."
            )
        name = key if len(chosen) == len(slots) else chosen[0]
        copies[name] = Parameter(original.detach().clone())
        where[name] = chosen
    return copies, where


def copies_of_modules(base: BaseModel, modules: Sequence[str], untie: bool) -> Copies:
    """Copies of all parameters of these modules, each module's own; a name is the end of a path or a pattern."""
    copies: dict[str, Parameter] = {}
    where: dict[str, Sequence[str]] = {}
    for path in paths_of_modules(base, modules):
        inside = {place for place in all_places(base) if place.startswith(f"{path}.")}
        more, at = copies_of(base, inside, untie)
        copies |= more
        where |= at
    return copies, where


@torch.no_grad()
def interpolate_copies(base: BaseModel, name: str, share: float) -> None:
    """Move a tuning's copies to W + share (W' - W), exact at 0 and 1; the sum is taken in fp32."""
    at = all_places(base)
    for key, copy in base.grafts.substitutes.get(name, {}).items():
        original = base.grafts.originals[at[key]]
        copy.copy_(torch.lerp(original.float(), copy.float(), share))


def paths_of_modules(base: BaseModel, modules: Sequence[str]) -> list[str]:
    """The modules that these names mean, by path; raises UserError for a name that means none."""
    found: dict[str, None] = {}
    for one in modules:
        paths = [path for path in base.grafts.modules if matches(one, path)]
        if not paths:
            raise UserError(f"modules_to_save: {one!r} is no module of this {base.family} model.")
        found |= dict.fromkeys(paths)
    return list(found)


def all_places(base: BaseModel) -> Mapping[str, str]:
    """Every place of a parameter, a tied one's too, with the name of the parameter that stands there."""
    return {place: key for key, slots in base.grafts.slots.items() for place in slots}
