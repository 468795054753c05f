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
from torch.autograd.function import once_differentiable

from luthier.models.kernels.calls import Kernels, kernels_for
from luthier.models.scratch import Scratch

# Classes of transformers that compute exactly this; Gemma's adds 1 to the weight and rounds once.
_SAME = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "T5LayerNorm"}


def quicken_norms(model: nn.Module) -> None:
    """Let every RMSNorm of a model run `rms_norm`; the modules stay who they are."""
    for module in model.modules():
        if is_rms_norm(module):
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module computes exactly this."""
    return type(module).__name__ in _SAME


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
        out, scale = norm_forward(x, weight, eps, Scratch())
        ctx.save_for_backward(x, scale, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        x, scale, weight = ctx.saved_tensors
        wanted_x, wanted_weight, _ = ctx.needs_input_grad
        given = outputs[0], x, scale, weight, Scratch()
        return (
            norm_backward(*given) if wanted_x else None,
            norm_weight_backward(*given) if wanted_weight else None,
            None,
        )


def norm_forward(
    x: Tensor, weight: Tensor, eps: float, scratch: Scratch, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The norm of x (..., D), into `out` where there is one, and the scale r (..., 1) in fp32."""
    if kernels := _kernels(x, weight):
        out = x.new_empty(x.shape) if out is None else out
        scale = kernels.norm(_flat(x), weight, eps, out.view(-1, x.shape[-1]))
        return out, scale.view(*x.shape[:-1], 1)
    wide = scratch.take("norm", x.shape, x, torch.float32).copy_(x)
    squares = torch.mul(wide, wide, out=scratch.take("norm too", x.shape, x, torch.float32))
    scale = squares.mean(-1, keepdim=True).add_(eps).rsqrt_()
    return _scaled(wide, scale, weight, out), scale


def norm_again(x: Tensor, scale: Tensor, weight: Tensor, scratch: Scratch, out: Tensor | None = None) -> Tensor:
    """What `norm_forward` gave, from the scale that it gave."""
    if out is not None and (kernels := _kernels(x, weight)):
        kernels.norm(_flat(x), weight, 0.0, out.view(-1, x.shape[-1]), scale)
        return out
    wide = scratch.take("norm", x.shape, x, torch.float32).copy_(x)
    return _scaled(wide, scale, weight, out)


def norm_backward(
    upstream: Tensor, x: Tensor, scale: Tensor, weight: Tensor, scratch: Scratch, skip: Tensor | None = None
) -> Tensor:
    """The gradient of x, and that of what skips the norm added."""
    if kernels := _kernels(x, weight):
        given = _flat(upstream), _flat(x), scale, weight, None if skip is None else _flat(skip)
        return kernels.norm_backward(*given).view(x.shape)
    wide = scratch.take("norm", x.shape, x, torch.float32).copy_(x)
    inner = scratch.take("norm too", x.shape, x, torch.float32).copy_(upstream * weight)
    along = torch.linalg.vecdot(inner, wide)[..., None].div_(x.shape[-1]).mul_(scale).mul_(scale)
    found = inner.addcmul_(wide, along, value=-1).mul_(scale).to(x.dtype, copy=True)
    return found if skip is None else found.add_(skip)


def norm_weight_backward(upstream: Tensor, x: Tensor, scale: Tensor, weight: Tensor, scratch: Scratch) -> Tensor:
    """The gradient of the weight."""
    if kernels := _kernels(x, weight):
        return kernels.norm_weight(_flat(upstream), _flat(x), scale).to(weight.dtype)
    wide = scratch.take("norm", x.shape, x, torch.float32).copy_(x).mul_(scale)
    return (upstream * wide.to(weight.dtype)).flatten(0, -2).sum(0)


def _kernels(x: Tensor, weight: Tensor) -> Kernels | None:
    fine = weight.dtype == x.dtype and weight.shape == x.shape[-1:] and type(weight) in (Tensor, nn.Parameter)
    return kernels_for(x) if fine else None


def _flat(x: Tensor) -> Tensor:
    """(..., D) as contiguous (T, D)."""
    return x if x.dim() == 2 and x.is_contiguous() else x.reshape(-1, x.shape[-1]).contiguous()


def _scaled(wide: Tensor, scale: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
    wide.mul_(scale)
    rounded = wide.to(weight.dtype) if out is None else out.copy_(wide)
    if rounded is wide:  # scratch, in fp32
        return wide * weight
    return rounded.mul_(weight)
