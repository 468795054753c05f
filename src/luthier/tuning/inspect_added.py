"""What a tuning learnt that stands beside the weights: IA3's factors, bottleneck adapters, key/value prefixes.

An adapter's linear part is W_up W_down; its spectrum is that of a LoRA product, without the activation in between. A prefix's
keys and values are compared with those the base computes for a text: keys longer than usual draw attention.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from luthier.models.base import BaseModel
from luthier.models.observe import keys_and_values
from luthier.tuning.bottleneck import Adapter
from luthier.tuning.ia3 import ScaledInput, ScaledOutput
from luthier.tuning.inspect_weights import Spectrum, block_of, singular_values, spectra_of
from luthier.tuning.prompt_tuning import vocabulary_ids


@dataclass(frozen=True)
class Scaling:
    """IA3's factors l of one module: `change` is the root mean square of l - 1, `amplified` the share of l above 1."""

    path: str
    block: int | None
    channels: int
    change: float
    amplified: float
    smallest: float
    largest: float


@dataclass(frozen=True)
class PrefixLayer:
    """One layer's prefix: mean norms of its keys and values over heads and positions, and those of random tokens.

    `alike` is the mean cosine between the values of different positions: at 1 they all say the same; None for one position.
    """

    layer: int
    key_norm: float
    usual_key_norm: float
    value_norm: float
    usual_value_norm: float
    alike: float | None


@torch.no_grad()
def inspect_scalings(base: BaseModel, name: str) -> list[Scaling]:
    """IA3's factors of every module of the tuning `name`, in the model's order."""
    found = []
    for path, (_, delta) in base.grafts.deltas(name).items():
        if isinstance(delta, (ScaledInput, ScaledOutput)):
            factors = delta.ia3_l.detach().double()
            found.append(
                Scaling(
                    path=path,
                    block=block_of(path),
                    channels=factors.numel(),
                    change=float((factors - 1).square().mean().sqrt()),
                    amplified=float((factors > 1).double().mean()),
                    smallest=float(factors.min()),
                    largest=float(factors.max()),
                )
            )
    return found


@torch.no_grad()
def inspect_adapters(base: BaseModel, name: str) -> list[Spectrum]:
    """The spectrum of W_up W_down of every adapter of the tuning `name`, in the model's order."""
    return spectra_of(
        (path, singular_values(delta.adapter_down.weight, delta.adapter_up.weight, 1.0), None)
        for path, (_, delta) in base.grafts.deltas(name).items()
        if isinstance(delta, Adapter)
    )


@torch.no_grad()
def inspect_prefix(base: BaseModel, name: str, seed: int = 0) -> list[PrefixLayer]:
    """The prefix `name` layer by layer, beside 64 random tokens drawn from `seed`."""
    own = base.grafts.prefixes[name]().detach().float()  # (layers, 2, K, P, d)
    ids = vocabulary_ids(base, min(64, base.context), torch.Generator().manual_seed(seed))
    usual = keys_and_values(base, ids)
    length = own.shape[3]
    layers = []
    for layer, (mine, theirs) in enumerate(zip(own, usual, strict=True)):
        keys, values = mine.norm(dim=-1).mean(dim=(1, 2)).tolist()
        usual_keys, usual_values = theirs.norm(dim=-1).mean(dim=(1, 2)).tolist()
        unit = F.normalize(mine[1].transpose(0, 1).flatten(1), dim=-1)  # (P, K d)
        alike = float(((unit @ unit.T).sum() - length) / (length * (length - 1))) if length > 1 else None
        layers.append(PrefixLayer(layer, keys, usual_keys, values, usual_values, alike))
    return layers
