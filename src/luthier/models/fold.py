"""A tuning folded into the weights it stands beside: W' = W + scale * B A for LoRA, and likewise for what else can.

    q_proj: Grafted(base=Linear(W), deltas={name: ...})   ->   q_proj: Linear(W')

A delta says itself how it folds (`Delta.merged`). Whole weights of the tuning's own (full fine-tuning) are taken as they
are. What stands before the rows, as soft prompts do, is in no weight and cannot be folded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

from luthier.errors import UserError
from luthier.models.dense import dense_weight
from luthier.models.quantize import QuantizedLinear

if TYPE_CHECKING:
    from luthier.models.grafts import Grafts


@dataclass(frozen=True)
class Fold:
    """A module's fp32 weight and bias with a delta folded in, laid out as the unquantized module stores them."""

    path: str
    module: nn.Module
    weight: Tensor
    bias: Tensor | None


@torch.no_grad()
def folds(grafts: "Grafts", name: str) -> Iterator[Fold]:
    """Fold each delta of a tuning, one module after another; the tuning's own whole weights must be in place.

    Raises UserError where part of the tuning is in no weight.
    """
    deltas = grafts.deltas(name)
    in_weights = {f"{path}.{key}" for path, (_, delta) in deltas.items() for key, _ in delta.named_parameters()}
    outside = grafts.owned(name).keys() - in_weights - grafts.substitutes.get(name, {}).keys()
    if outside:
        raise UserError(
            f"The tuning {name!r} cannot be merged: {', '.join(sorted(outside)[:3])} stand before the rows, as tokens "
            "would, and no weights give the same outputs. Use the tuning beside its base (`luthier generate`)."
        )
    for path, (module, delta) in deltas.items():
        bias = getattr(module, "bias", None)
        held = isinstance(getattr(module, "weight", None), Tensor)  # a whole block has no weight to fold into
        merged = delta.merged(dense_weight(module), None if bias is None else bias.detach().float()) if held else None
        if merged is None:
            raise UserError(
                f"The tuning {name!r} cannot be merged: what it adds to {path} is no change of that module's weights "
                "(it computes with the output, or is not linear). Use the tuning beside its base (`luthier generate`)."
            )
        weight, changed = merged
        if changed is not None and bias is None:
            raise UserError(
                f"The tuning {name!r} cannot be merged: it gives {path} a bias, and this architecture has none there."
            )
        yield Fold(path, module, as_stored(module, weight), changed)


def as_stored(module: nn.Module, weight: Tensor) -> Tensor:
    """A linear's (out, in) weight as its architecture stores it: GPT-2's linears the other way round."""
    transposed = module.transposed if isinstance(module, QuantizedLinear) else isinstance(module, Conv1D)
    return weight.T.contiguous() if transposed else weight


class FoldedInPlace:
    """A tuning's deltas folded into copies that stand in the modules; the originals are kept and come back as they were."""

    def __init__(self, grafts: "Grafts", name: str):
        self._kept: list[tuple[nn.Module, str, Parameter]] = []
        packed = [path for path, (module, _) in grafts.deltas(name).items() if isinstance(module, QuantizedLinear)]
        if packed:
            raise UserError(
                f"The tuning {name!r} cannot be merged in memory: the base keeps {packed[0]} in 4 bits, and the sum needs "
                "16. Use it unmerged, or write a merged model with `luthier merge`."
            )
        try:
            for fold in folds(grafts, name):
                self._put(fold.module, "weight", fold.weight)
                if fold.bias is not None:
                    self._put(fold.module, "bias", fold.bias)
        except BaseException:
            self.restore()
            raise

    def _put(self, module: nn.Module, key: str, value: Tensor) -> None:
        original = module._parameters[key]
        assert original is not None
        self._kept.append((module, key, original))
        module._parameters[key] = Parameter(value.to(original.dtype), requires_grad=False)

    def restore(self) -> None:
        """Put the originals back: the same objects, which nothing has written to."""
        for module, key, original in reversed(self._kept):
            module._parameters[key] = original
        self._kept.clear()
