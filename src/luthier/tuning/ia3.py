"""IA3: infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022, https://arxiv.org/abs/2205.05638).

    k' = l_k * (W_k x),  v' = l_v * (W_v x),  h' = W_out (l_ff * f(W_in x))        l: one number a channel

All l start at 1, so a fresh one changes nothing. Where one linear computes queries, keys and values, all three are
scaled: scaling queries adds nothing to scaling keys, because only their products count.

    k_proj: Linear      ->   k_proj: Grafted(base=Linear, deltas={name: ScaledOutput(l)})
    down_proj: Linear   ->   down_proj: Grafted(base=Linear, deltas={name: ScaledInput(l)})
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

from luthier.models.base import BaseModel
from luthier.models.grafted import Delta
from luthier.models.matmul import by_column
from luthier.models.parts import layout
from luthier.models.products import Plain, Product, plain
from luthier.tuning import peft
from luthier.tuning.low_rank import features
from luthier.tuning.method import Defaults, Law, Laws, Method
from luthier.tuning.targets import LINEAR, match_modules


class ScaledOutput(Delta):
    """y * l"""

    def __init__(self, channels: int):
        super().__init__()
        self.ia3_l = Parameter(torch.ones(channels))  # (out,)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x: (..., in), y: (..., out), the base's output for x."""
        return y * self.ia3_l.to(y.dtype)

    def as_product(self, base: nn.Module) -> Product | None:
        """The frozen linear and its factors together."""
        linear = plain(base)
        return None if linear is None or linear.trained else _ScaledOutput(linear, self.ia3_l)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """l W and l b: rows of W are outputs."""
        return weight * self.ia3_l[:, None], None if bias is None else bias * self.ia3_l


class ScaledInput(Delta):
    """W (x * l) + b"""

    changes_input: ClassVar[bool] = True

    def __init__(self, channels: int):
        super().__init__()
        self.ia3_l = Parameter(torch.ones(channels))  # (in,)

    def enter(self, x: Tensor) -> Tensor:
        """x: (..., in)"""
        return x * self.ia3_l.to(x.dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y: (..., out), the base's output for the scaled input."""
        return y

    def as_product(self, base: nn.Module) -> Product | None:
        """The factors and the frozen linear together."""
        linear = plain(base)
        return None if linear is None or linear.trained else _ScaledInput(linear, self.ia3_l)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """W with its columns, which are inputs, scaled."""
        return weight * self.ia3_l, bias


class _ScaledOutput(Product):
    """y * l for a frozen linear; y is kept."""

    def __init__(self, linear: Plain, factors: Parameter):
        self.linear, self.width, self.trained = linear, linear.width, (factors,)

    def forward(self, x: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        """x: (T, in), out: (T, out)."""
        factors = self.trained[0].to(x.dtype)
        self.linear.forward(x, y := torch.empty_like(out))
        torch.mul(y, factors, out=out)
        return y, factors

    def backward_input(
        self, upstream: Tensor, kept: Sequence[Tensor], into: Tensor | None, add: bool = False
    ) -> tuple[Tensor, ...]:
        """upstream: (T, out), into: (T, in)."""
        if into is not None:
            into_y = torch.mul(upstream, kept[1], out=self._take("scaled", upstream, self.width))
            self.linear.backward_input(into_y, (), into, add)
        return ()

    def backward_weights(
        self, upstream: Tensor, x: Tensor, kept: Sequence[Tensor], passed: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """upstream: (T, out)."""
        return [by_column(upstream, kept[0]).to(self.trained[0].dtype)]


class _ScaledInput(Product):
    """W (x * l) + b for a frozen linear."""

    reads = True
    rereads = False

    def __init__(self, linear: Plain, factors: Parameter):
        self.linear, self.width, self.trained = linear, linear.width, (factors,)

    def forward(self, x: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        """x: (T, in), out: (T, out)."""
        factors = self.trained[0].to(x.dtype)
        self.linear.forward(torch.mul(x, factors, out=self._take("scaled", x, x.shape[1])), out)
        return (factors,)

    def again(self, x: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        """The factors."""
        return (self.trained[0].to(x.dtype),)

    def backward_input(
        self, upstream: Tensor, kept: Sequence[Tensor], into: Tensor | None, add: bool = False
    ) -> tuple[Tensor, ...]:
        """upstream: (T, out), into: (T, in)."""
        into_scaled = self._take("scaled", upstream, len(self.trained[0]))
        self.linear.backward_input(upstream, (), into_scaled)
        if into is not None and add:
            into.addcmul_(into_scaled, kept[0])
        elif into is not None:
            torch.mul(into_scaled, kept[0], out=into)
        return (into_scaled,)

    def backward_weights(
        self, upstream: Tensor, x: Tensor, kept: Sequence[Tensor], passed: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """x: (T, in)."""
        return [by_column(passed[0], x).to(self.trained[0].dtype)]


@dataclass(frozen=True)
class IA3(Method):
    """Train one factor for each channel of keys, values and the MLP's inner activations.

    `targets` names the modules whose outputs are scaled, `inner` those whose inputs are; `auto` is the keys and values,
    and the MLP's last linear, of the families known here.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    # Factors near 1 shared by all positions: they need larger steps than matrices.
    defaults: ClassVar[Defaults] = Defaults(learning_rate=1e-2)
    peft_type: ClassVar[str] = "IA3"
    laws: ClassVar[Laws] = Laws(
        identity_at_start=Law(True, "all factors are 1"),
        merge=Law(True, "a factor of a channel is a factor of a row or column of W"),
        mixed_batches=Law(True, "it scales the activations of its own rows only"),
    )

    method: Literal["ia3"] = "ia3"
    targets: str | list[str] = "auto"
    inner: str | list[str] = "auto"

    def __post_init__(self) -> None:
        if not self.targets and not self.inner:
            raise ValueError("targets and inner are both empty; name modules, or auto")

    def attach(self, base: BaseModel, name: str, generator: torch.Generator) -> None:
        """Graft factors on every target."""
        outer, inner = self._targets(base)
        for path, module in outer.items():
            base.grafts.graft_module(path, name, ScaledOutput(features(module)[1]).to(base.device))
        for path, module in inner.items():
            base.grafts.graft_module(path, name, ScaledInput(features(module)[0]).to(base.device))

    def _targets(self, base: BaseModel) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        outer = list(layout(base).keys_values) if self.targets == "auto" else self.targets
        inner = layout(base).mlp_output if self.inner == "auto" else self.inner
        insides = match_modules(base, inner, LINEAR) if inner else {}
        outsides = match_modules(base, outer, LINEAR) if outer else {}
        return {path: module for path, module in outsides.items() if path not in insides}, insides

    def toward_base(self, base: BaseModel, name: str, share: float) -> None:
        """1 + share (l - 1): each weight it is folded into moves by that share."""
        with torch.no_grad():
            for factors in base.grafts.owned(name).values():
                factors.copy_(torch.lerp(torch.ones_like(factors), factors, share))

    def peft_config(self, base: BaseModel, name: str) -> dict[str, Any]:
        """A PEFT IA3Config."""
        outer, inner = self._targets(base)
        return peft.header(base, self.peft_type) | {
            "target_modules": sorted({**outer, **inner}),
            "feedforward_modules": sorted(inner),
            "fan_in_fan_out": any(isinstance(module, Conv1D) for module in inner.values()),
        }

    @classmethod
    def from_peft(cls, base: BaseModel, config: Mapping[str, Any]) -> "IA3":
        """The IA3 that a PEFT IA3Config describes."""
        peft.refuse_others(config, {"target_modules", "exclude_modules", "feedforward_modules", "init_ia3_weights"})
        every = peft.chosen_modules(base, config, LINEAR)
        feedforward = config.get("feedforward_modules")
        inner = set(peft.chosen_modules(base, config, LINEAR, "feedforward_modules")) if feedforward else set()
        return cls(
            targets=[path for path in every if path not in inner], inner=[path for path in every if path in inner]
        )

    def to_file(self, base: BaseModel, name: str) -> dict[str, Tensor]:
        """PEFT's keys and shapes: (out, 1), and (1, in) where an input is scaled."""
        _, inner = self._targets(base)
        owned = base.grafts.owned(name)
        return {
            peft.PREFIX + key: tensor[None] if key.removesuffix(".ia3_l") in inner else tensor[:, None]
            for key, tensor in owned.items()
        }

    def from_file(self, base: BaseModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From PEFT's keys and shapes."""
        _, inner = self._targets(base)
        found = {}
        for key, tensor in tensors.items():
            own = key.removeprefix(peft.PREFIX)
            place = 0 if own.removesuffix(".ia3_l") in inner else 1
            found[own] = tensor.squeeze(place) if tensor.ndim == 2 and tensor.shape[place] == 1 else tensor
        return found
