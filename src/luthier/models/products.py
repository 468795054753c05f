"""Linears whose gradients a block writes out itself: without autograd, into tensors that are there already.

    y = x W^T + b      dx = g W (+ what is in dx)      dW = g^T x      db = sum over rows of g

All tensors are flat: x (T, in), y and g (T, out).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from luthier.models.dense import product_weight
from luthier.models.matmul import Thin, by_kernels, gradient, product
from luthier.models.quantize import QuantizedLinear
from luthier.models.scratch import Scratch

LINEARS = (nn.Linear, Conv1D, QuantizedLinear)


class Product(ABC):
    """A linear, tuned or not. `trained` are the tensors that `backward` gives gradients of, in its order."""

    trained: tuple[Tensor, ...] = ()
    # Whether `backward` reads x.
    reads: bool = False
    # Whether `again` does.
    rereads: bool = True
    width: int  # of y
    # Memory for a moment, where a block lends it.
    scratch: Scratch | None = None

    @abstractmethod
    def forward(self, x: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        """Write y into `out`; returns what `backward` needs besides x."""

    def again(self, x: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        """What `forward` returned, once more; what it writes into `out` is not looked at."""
        return self.forward(x, out)

    @abstractmethod
    def backward_input(
        self, upstream: Tensor, kept: Sequence[Tensor], into: Tensor | None, add: bool = False
    ) -> tuple[Tensor, ...]:
        """Write dx into `into`, where it is wanted, or add it to what is there; returns what `backward_weights` needs of it."""

    @abstractmethod
    def backward_weights(
        self, upstream: Tensor, x: Tensor, kept: Sequence[Tensor], passed: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The gradients of `trained`; x is whatever it may be where `reads` is false."""

    def backward(
        self, upstream: Tensor, x: Tensor, kept: Sequence[Tensor], into: Tensor | None, add: bool = False
    ) -> list[Tensor | None]:
        """Both, one after another."""
        return self.backward_weights(upstream, x, kept, self.backward_input(upstream, kept, into, add))

    def _take(self, name: str, like: Tensor, width: int) -> Tensor:
        """(T, width) of arbitrary numbers, until the name is asked for again."""
        if self.scratch is None:
            return like.new_empty(len(like), width)
        return self.scratch.take(name, (len(like), width), like)


class Plain(Product):
    """A linear as it stands in the model: frozen, trained or in 4 bits."""

    rereads = False

    def __init__(self, module: nn.Module):
        self.module = module
        self.packed = isinstance(module, QuantizedLinear)
        weight, self.bias = module._parameters["weight"], module._parameters.get("bias")
        # As products read it, looked up once for a pass's two or three of them.
        self.dense = None if self.packed or weight is None else product_weight(module, weight.dtype)
        self.wanted = [one is not None and one.requires_grad for one in (weight, self.bias)]
        self.reads = self.wanted[0]
        self.width = int(module.nf if isinstance(module, Conv1D) else module.out_features)  # type: ignore[arg-type]
        self.trained = tuple(one for one, wanted in zip((weight, self.bias), self.wanted, strict=True) if wanted)  # type: ignore[misc]

    def forward(self, x: Tensor, out: Tensor, thin: Thin | None = None) -> tuple[Tensor, ...]:
        """x: (T, in), out: (T, out); `thin`, if any, is what stands beside this linear."""
        self._multiply(x, True, out, self.bias, thin)
        return ()

    def again(self, x: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        """Nothing."""
        return ()

    def backward_input(
        self,
        upstream: Tensor,
        kept: Sequence[Tensor],
        into: Tensor | None,
        add: bool = False,
        thin: Thin | None = None,
    ) -> tuple[Tensor, ...]:
        """upstream: (T, out), into: (T, in)."""
        if into is not None:
            self._multiply(upstream, False, into, None, thin, add)
        return ()

    def _multiply(
        self, x: Tensor, forward: bool, out: Tensor, bias: Tensor | None, thin: Thin | None, add: bool = False
    ) -> None:
        """x W^T + bias, or x W."""
        alike = x.is_contiguous() and (bias is None or bias.dtype == x.dtype)
        weight = self.module.four_bits(forward, x.dtype) if self.packed and alike and by_kernels(x) else None  # type: ignore[operator]
        if weight is None:
            dense = self.dense
            if dense is None or dense.dtype != x.dtype:
                dense = product_weight(self.module, x.dtype)
            weight = dense.T if forward else dense
        product(x, weight, out, bias, thin, add)

    def backward_weights(
        self, upstream: Tensor, x: Tensor, kept: Sequence[Tensor], passed: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """upstream: (T, out), x: (T, in)."""
        found: list[Tensor | None] = []
        if self.wanted[0]:
            turned = isinstance(self.module, Conv1D)
            found.append(gradient(x, upstream) if turned else gradient(upstream, x))
        if self.wanted[1]:
            found.append(upstream.sum(0))
        return found


class _Alone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product, *trained: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        out = x.new_empty(*x.shape[:-1], product.width)  # no view: who has it may change it
        kept = product.forward(flat, out.view(-1, product.width))
        ctx.save_for_backward(flat if product.reads else None, *kept)
        ctx.product, ctx.shape = product, x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        flat, *kept = ctx.saved_tensors
        upstream = outputs[0].flatten(0, -2).contiguous()
        into = upstream.new_empty(len(upstream), ctx.shape[-1]) if ctx.needs_input_grad[0] else None
        found = ctx.product.backward(upstream, flat, kept, into)
        return None if into is None else into.view(ctx.shape), None, *found


def apply_alone(product: Product, x: Tensor) -> Tensor:
    """A product outside of a block, for autograd: x (..., in) to (..., out)."""
    return _Alone.apply(x, product, *product.trained)  # type: ignore[no-any-return]


def quicken_linears(model: nn.Module) -> None:
    """Let every linear of a model run by the kernels where they can; the modules stay who they are."""
    for module in model.modules():
        if type(module) in LINEARS:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(self: Any, x: Tensor) -> Tensor:
    if not by_kernels(x):
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    linear = Plain(self)
    if torch.is_grad_enabled():
        return apply_alone(linear, x)
    out = x.new_empty(*x.shape[:-1], linear.width)
    linear.forward(x.reshape(-1, x.shape[-1]).contiguous(), out.view(-1, linear.width))
    return out


def hooked(module: nn.Module) -> bool:
    """Whether someone waits for a module's call, so that it has to be called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def plain(module: nn.Module) -> Plain | None:
    """A linear of the model as a product; None for any other module, and for one with hooks."""
    return Plain(module) if type(module) in LINEARS and not hooked(module) else None
