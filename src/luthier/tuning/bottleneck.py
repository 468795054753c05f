"""Bottleneck adapters: a small network behind a sub-layer, around it a residual.

    h' = h + W_up f(W_down h + b_down) + b_up        W_down: (m, D), W_up: (D, m), m = D / reduction

`houlsby` (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751) adapts the outputs of attention and MLP, before their
residual sums; `pfeiffer` (Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247) the MLP's only; `parallel` (He et al.
2022, https://arxiv.org/abs/2110.04366) reads the MLP's input h and adds to its output. W_up and b_up start at zero, so
a fresh one changes nothing.

    down_proj: Linear   ->   down_proj: Grafted(base=Linear, deltas={name: Adapter(W_down, W_up)})
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.errors import UserError
from luthier.models.base import BaseModel
from luthier.models.grafted import Delta
from luthier.models.matmul import gradient, product
from luthier.models.parts import layout, matching
from luthier.models.products import Plain, Product, plain
from luthier.tuning.method import Defaults, Law, Laws, Method

aten = torch.ops.aten
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
# The gradient of an activation's input, from that of its output.
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda upstream, h: aten.threshold_backward(upstream, h, 0),
    "gelu": lambda upstream, h: aten.gelu_backward(upstream, h),
    "silu": lambda upstream, h: aten.silu_backward(upstream, h),
    "tanh": lambda upstream, h: aten.tanh_backward(upstream, torch.tanh(h)),
}


class Adapter(Delta):
    """y + W_up f(W_down h), h = y behind the sub-layer and h = x beside it; computed in the precision of h."""

    def __init__(self, width: int, inner: int, activation: str, parallel: bool, generator: torch.Generator):
        super().__init__()
        self.adapter_down = nn.Linear(width, inner)
        self.adapter_up = nn.Linear(inner, width)
        nn.init.normal_(self.adapter_down.weight, std=width**-0.5, generator=generator)
        for zero in (self.adapter_down.bias, self.adapter_up.weight, self.adapter_up.bias):
            nn.init.zeros_(zero)
        self.activation = activation
        self.parallel = parallel

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x: (..., in), y: (..., D), the base's output for x."""
        h = x if self.parallel else y
        down, up = self.adapter_down, self.adapter_up
        inner = ACTIVATIONS[self.activation](F.linear(h, down.weight.to(h.dtype), down.bias.to(h.dtype)))
        return y + F.linear(inner, up.weight.to(h.dtype), up.bias.to(h.dtype))

    def as_product(self, base: nn.Module) -> Product | None:
        """The frozen linear and the network behind it together."""
        linear = plain(base)
        return None if self.parallel or linear is None or linear.trained else _Behind(linear, self)


class _Behind(Product):
    """y + W_up f(W_down y + b_down) + b_up for a frozen linear's y, which is kept, as is what f is applied to."""

    def __init__(self, linear: Plain, adapter: Adapter):
        self.linear, self.width, self.activation = linear, linear.width, adapter.activation
        down, up = adapter.adapter_down, adapter.adapter_up
        self.trained = down.weight, down.bias, up.weight, up.bias

    def forward(self, x: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        """x: (T, in), out: (T, D)."""
        down, down_bias, up, up_bias = (one.to(x.dtype) for one in self.trained)
        self.linear.forward(x, y := torch.empty_like(out))
        product(y, down.T, h := y.new_empty(len(y), len(down)), down_bias)
        product(ACTIVATIONS[self.activation](h), up.T, out.copy_(y), up_bias, add=True)
        return y, h, down, up

    def backward_input(
        self, upstream: Tensor, kept: Sequence[Tensor], into: Tensor | None, add: bool = False
    ) -> tuple[Tensor, ...]:
        """upstream: (T, D), into: (T, in)."""
        _, h, down, up = kept
        product(upstream, up, into_inner := torch.empty_like(h))
        into_h = _BACKWARD[self.activation](into_inner, h)
        if into is not None:
            product(into_h, down, into_y := upstream.clone(), add=True)
            self.linear.backward_input(into_y, (), into, add)
        return (into_h,)

    def backward_weights(
        self, upstream: Tensor, x: Tensor, kept: Sequence[Tensor], passed: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """upstream: (T, D)."""
        y, h, *_ = kept
        (into_h,) = passed
        down = gradient(into_h, y), into_h.sum(0)
        up = gradient(upstream, ACTIVATIONS[self.activation](h)), upstream.sum(0)
        return [found.to(one.dtype) for one, found in zip(self.trained, (*down, *up), strict=True)]


@dataclass(frozen=True)
class Bottleneck(Method):
    """Train small networks behind (`houlsby`, `pfeiffer`) or beside (`parallel`) the sub-layers of every block.

    The inner width is the model's width divided by `reduction`, at least 1.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    defaults: ClassVar[Defaults] = Defaults(learning_rate=1e-3)
    laws: ClassVar[Laws] = Laws(
        identity_at_start=Law(True, "W_up and b_up are zero"),
        merge=Law(False, "f is not linear, so no weights of the base give the same outputs"),
        mixed_batches=Law(True, "it adds to the outputs of its own rows only"),
    )

    method: Literal["bottleneck"] = "bottleneck"
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    reduction: int = 16
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise ValueError(f"reduction is {self.reduction}; it must be at least 1")

    def attach(self, base: BaseModel, name: str, generator: torch.Generator) -> None:
        """Graft a network on every sub-layer."""
        inner = max(1, base.width // self.reduction)
        for path in self._sublayers(base):
            delta = Adapter(base.width, inner, self.activation, self.placement == "parallel", generator)
            base.grafts.graft_module(path, name, delta.to(base.device))

    def _sublayers(self, base: BaseModel) -> list[str]:
        where = layout(base)
        if self.placement == "parallel" and not where.mlp:
            raise UserError(
                f"The MLP of this {base.family} model is no module of its own, so nothing can stand beside it. "
                "Use placement: pfeiffer or houlsby."
            )
        patterns = {
            "houlsby": [where.attention_output, where.mlp_output],
            "pfeiffer": [where.mlp_output],
            "parallel": [where.mlp],
        }
        return [path for pattern in patterns[self.placement] for path in matching(base, pattern)]

    def toward_base(self, base: BaseModel, name: str, share: float) -> None:
        """Multiply what the adapters add: W_up and its bias."""
        with torch.no_grad():
            for _, delta in base.grafts.deltas(name).values():
                assert isinstance(delta, Adapter)
                delta.adapter_up.weight.mul_(share)
                delta.adapter_up.bias.mul_(share)
