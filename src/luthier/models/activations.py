"""Activations of MLPs in one kernel each way.

GELU by its tanh formula (Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415), which GPT-2 and T5's later versions use, is
eight operations in transformers (`gelu_new`), each of which keeps its result for the backward pass. The formula is the same;
one kernel rounds once.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.models.kernels.calls import kernels_for
from luthier.models.products import hooked

aten = torch.ops.aten

_TANH_GELU = {"NewGELUActivation", "FastGELUActivation"}


class Activation(NamedTuple):
    """Elementwise: `forward(x, out=)` and `backward(upstream, x, out=)`, and which of the kernels' it is."""

    kind: int
    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor]

    def gate(self, g: Tensor, u: Tensor | None, out: Tensor) -> Tensor:
        """act(g) * u, or without u act(g), into `out`."""
        if kernels := kernels_for(g):
            kernels.activate(self.kind, g, u, out)
            return out
        found = self.forward(g, out=out)
        return found if u is None else found.mul_(u)

    def gate_backward(
        self, into_g: Tensor, g: Tensor, u: Tensor | None, into_u: Tensor | None, again: Tensor | None = None
    ) -> None:
        """The gradient of u into `into_u`, and that of g in the place of the upstream gradient, `into_g`; what `gate` gave into `again`."""
        if kernels := kernels_for(g):
            kernels.activate_backward(self.kind, into_g, g, u, into_u, again)
            return
        if again is not None:
            self.gate(g, u, again)
        if u is not None:
            torch.mul(into_g, self.forward(g, out=into_u), out=into_u)
            into_g.mul_(u)
        self.backward(into_g, g, out=into_g)


_SILU = Activation(
    0,
    lambda x, out: aten.silu.out(x, out=out),
    lambda upstream, x, out: aten.silu_backward.grad_input(upstream, x, grad_input=out),
)
_GELU = Activation(
    1,
    lambda x, out: aten.gelu.out(x, approximate="tanh", out=out),
    lambda upstream, x, out: aten.gelu_backward.grad_input(upstream, x, approximate="tanh", grad_input=out),
)
_RELU = Activation(
    2,
    lambda x, out: torch.clamp(x, min=0, out=out),
    lambda upstream, x, out: aten.threshold_backward.grad_input(upstream, x, 0, grad_input=out),
)
_WRITTEN_OUT = {"SiLUActivation": _SILU, "ReLU": _RELU, **dict.fromkeys(_TANH_GELU, _GELU)}


def written_out_activation(module: nn.Module) -> Activation | None:
    """An activation's function and gradient, where they are written out and nobody waits for the module's call."""
    return None if hooked(module) else _WRITTEN_OUT.get(type(module).__name__)


def quicken_activations(model: nn.Module) -> None:
    """Let every tanh GELU of a model run as one kernel; the modules stay who they are."""
    for module in model.modules():
        if type(module).__name__ in _TANH_GELU:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(_: Any, x: Tensor) -> Tensor:
    return _Gelu.apply(x) if kernels_for(x) else F.gelu(x, approximate="tanh")  # type: ignore[no-any-return]


class _Gelu(torch.autograd.Function):
    """By the kernels, so that a block of one function and its modules give the same bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x := x.contiguous())
        return _GELU.gate(x, None, torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        into = outputs[0].clone(memory_format=torch.contiguous_format)
        _GELU.gate_backward(into, ctx.saved_tensors[0], None, None)
        return into
