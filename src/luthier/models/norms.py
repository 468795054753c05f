"""RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467) with its gradient written out.

    y = w * (r x)      r = 1 / sqrt(mean(x^2) + eps)
    dx = r (u - r^2 x mean(u x))      u = g w, g the upstream gradient;      dw = sum over rows of g (r x)

transformers' own is eight operations, keeps each result in fp32 for the backward pass, and T5's multiplies two precisions,
which a CPU does slowly. The values are the same: fp32 inside, rounded where transformers rounds.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Classes of transformers that compute exactly this; Gemma's adds 1 to the weight and rounds once.
_SAME = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "T5LayerNorm"}


def quicken_norms(model: nn.Module) -> None:
    """Let every RMSNorm of a model run `rms_norm`; the modules stay who they are."""
    for module in model.modules():
        if type(module).__name__ in _SAME:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: (..., D), weight: (D,)."""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]


def _forward(self: Any, hidden_states: Tensor) -> Tensor:
    weight = self.weight
    if hidden_states.is_cuda and hidden_states.dtype == weight.dtype:  # one kernel each way there, that rounds once
        return F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)
    return rms_norm(hidden_states, weight, self.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = (wide * wide).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return weight * (wide * scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (upstream,) = outputs
        x, scale, weight = ctx.saved_tensors
        wanted_x, wanted_weight, _ = ctx.needs_input_grad
        wide, into_x, into_weight = x.float(), None, None
        if wanted_x:
            inner = (upstream * weight).float()
            along = (inner * wide).mean(-1, keepdim=True).mul_(scale).mul_(scale)
            into_x = torch.addcmul(inner, wide, along, value=-1).mul_(scale).to(x.dtype)
        if wanted_weight:
            into_weight = (upstream * (wide * scale).to(weight.dtype)).flatten(0, -2).sum(0)
        return into_x, into_weight, None
