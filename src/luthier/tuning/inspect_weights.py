"""What a tuning did to the weights: the spectrum of each low-rank product, or the change of each block.

The singular values of scale * B A come from an r x r core: with B = Q_b R_b and A^T = Q_a R_a,

    B A = Q_b (R_b R_a^T) Q_a^T        so BA and R_b R_a^T have the same singular values, and BA is never formed.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.models.base import BaseModel
from luthier.models.dense import dense_weight
from luthier.tuning.dora import DoRA, DoRAEmbedding
from luthier.tuning.lora_embedding import LowRankEmbedding
from luthier.tuning.low_rank import LowRank


@dataclass(frozen=True)
class Spectrum:
    """The product that a LoRA adds to one weight, or W_up W_down of an adapter.

    `norm` is ||scale B A||, `relative` ||W' - W|| / ||W||, all Frobenius: for LoRA W' - W is that product, for DoRA its
    magnitudes are in W' too, though in no other number here; an embedding's W is its table, an adapter has none; `effective_rank` is exp of the entropy of the
    singular values' shares (Roy & Vetterli 2007), from 1 to r; `energy` the product's share of the tuning's squared norm.
    """

    path: str
    block: int | None
    rank: int
    singular_values: list[float]
    norm: float
    relative: float | None
    effective_rank: float
    energy: float


@dataclass(frozen=True)
class Change:
    """How far the weights of one block (or one part beside the blocks) moved: ||W' - W|| / ||W||."""

    part: str
    parameters: int
    relative: float
    most_moved: str
    most_relative: float


@torch.no_grad()
def inspect_lora(base: BaseModel, name: str) -> list[Spectrum]:
    """The spectrum of every product of the tuning `name`, in the model's order."""
    found: list[tuple[str, Tensor, float | None]] = []
    for path, (module, delta) in base.grafts.deltas(name).items():
        if isinstance(delta, LowRank):
            values = singular_values(delta.lora_A.weight, delta.lora_B.weight, delta.scale)
        elif isinstance(delta, LowRankEmbedding):
            values = singular_values(delta.lora_embedding_A, delta.lora_embedding_B, delta.scale)
        else:
            continue
        weight, moved = dense_weight(module), float(values.norm())
        if isinstance(delta, (DoRA, DoRAEmbedding)):
            whole = delta.merged(weight, None)
            assert whole is not None
            moved = float((whole[0] - weight).norm())
        found.append((path, values, moved / (float(weight.norm()) or 1.0)))
    return spectra_of(found)


def spectra_of(products: Iterable[tuple[str, Tensor, float | None]]) -> list[Spectrum]:
    """Spectra of one tuning's products, given as path, singular values and relative change."""
    found = list(products)
    total = sum(float(values.square().sum()) for _, values, _ in found) or 1.0
    return [
        Spectrum(
            path=path,
            block=block_of(path),
            rank=len(values),
            singular_values=values.tolist(),
            norm=float(values.norm()),
            relative=relative,
            effective_rank=effective_rank(values),
            energy=float(values.square().sum()) / total,
        )
        for path, values, relative in found
    ]


def singular_values(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The singular values of scale * b @ a, largest first, in fp64; a: (r, in), b: (out, r)."""
    left = torch.linalg.qr(b.detach().double().cpu(), mode="r").R
    right = torch.linalg.qr(a.detach().double().cpu().T, mode="r").R
    values: Tensor = torch.linalg.svdvals(abs(scale) * left @ right.T)
    return values


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the values' shares; 0 where all are 0."""
    total = float(values.sum())
    if not total:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


@torch.no_grad()
def inspect_substitutes(base: BaseModel, name: str) -> list[Change]:
    """The change of every block that has weights of the tuning's own; the bare base is in use afterwards."""
    base.use(None)
    parts: dict[str, list[tuple[str, int, float, float]]] = {}
    for key, parameter in base.grafts.substitutes[name].items():
        path, _, last = key.rpartition(".")
        here = base.grafts.modules[path]._parameters[last]
        assert here is not None
        original = here.detach().float()
        moved = float((parameter.detach().float() - original).square().sum())
        parts.setdefault(_part(key), []).append((key, parameter.numel(), moved, float(original.square().sum())))
    changes = []
    for part, weights in parts.items():
        most = max(weights, key=lambda one: _ratio(one[2], one[3]))
        changes.append(
            Change(
                part=part,
                parameters=sum(count for _, count, _, _ in weights),
                relative=_ratio(sum(moved for *_, moved, _ in weights), sum(size for *_, size in weights)),
                most_moved=most[0],
                most_relative=_ratio(most[2], most[3]),
            )
        )
    return changes


def block_of(path: str) -> int | None:
    """The number of the block that a module path lies in; None beside the blocks."""
    numbers = re.search(r"\.(\d+)\.", f".{path}.")
    return int(numbers[1]) if numbers else None


def _part(key: str) -> str:
    """`model.layers.3` for what lies in a block, else the module's own path."""
    inside = re.match(r"(.*?\.\d+)\.", key)
    return inside[1] if inside else key.rpartition(".")[0] or key


def _ratio(moved: float, size: float) -> float:
    return math.sqrt(moved / size) if size else 0.0
