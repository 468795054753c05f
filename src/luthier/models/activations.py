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

from luthier.models.products import hooked

aten = torch.ops.aten

_TANH_GELU = {"NewGELUActivation", "FastGELUActivation"}


class Activation(NamedTuple):
    """Elementwise: `forward(x, out=)` and `backward(upstream, x, out=)`."""

    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor]


_SILU = Activation(
    lambda x, out: aten.silu.out(x, out=out),
    lambda upstream, x, out: aten.silu_backward.grad_input(upstream, x, grad_input=out),
)
_GELU = Activation(
    lambda x, out: aten.gelu.out(x, approximate="tanh", out=out),
    lambda upstream, x, out: aten.gelu_backward.grad_input(upstream, x, approximate="tanh", grad_input=out),
)
_RELU = Activation(
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
    return F.gelu(x, approximate="tanh")
