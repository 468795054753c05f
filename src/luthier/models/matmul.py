"""Products of flat tensors, by the kernels or by PyTorch: with the weight of a linear, and with matrices of few rows, as LoRA's are.

x and y are (T, n), low is (T, r), thin matrices are (r, n). PyTorch computes what has r columns as its transpose, with r rows: on a CPU
four times faster.
"""

import torch
from torch import Tensor

from luthier.models.kernels.calls import FourBits, Kernels, kernels_for

# What stands beside a linear: low and a thin matrix, whose product is added.
Thin = tuple[Tensor, Tensor]


def by_kernels(x: Tensor) -> bool:
    """Whether products of tensors like this one run by the kernels, which make nothing anew for another number of rows."""
    return kernels_for(x) is not None


def product(
    x: Tensor,
    w: Tensor | FourBits,
    out: Tensor,
    bias: Tensor | None = None,
    thin: Thin | None = None,
    add: bool = False,
) -> None:
    """x W + bias + low thin into `out`, or added to what is there: (T, n), (n, m), (m,), (T, r), (r, m) into (T, m).

    A weight in 4 bits is for those whom `by_kernels` says yes to.
    """
    if kernels := _for_product(x, w, out, bias):
        kernels.product(x, w, bias, beside := _beside(thin, out), out, add)
        thin = thin if beside is None else None
    elif isinstance(w, FourBits):
        raise ValueError("PyTorch has no product with a weight in 4 bits of bfloat16 on a CPU")
    elif add:
        out.addmm_(x, w)
        if bias is not None:
            out.add_(bias)
    elif bias is None:
        torch.mm(x, w, out=out)
    else:
        torch.addmm(bias, x, w, out=out)
    if thin is not None:
        widen(*thin, out)


def gradient(g: Tensor, x: Tensor) -> Tensor:
    """g^T x, (m, n)."""
    fits = g.shape[0] == x.shape[0] and g.dtype == x.dtype and g.is_contiguous() and x.is_contiguous()
    kernels = kernels_for(x) if fits else None
    return g.T @ x if kernels is None else kernels.gradient(g, x)


def narrow(x: Tensor, w: Tensor) -> Tensor:
    """x W^T, (T, r)."""
    fits = x.shape[1] == w.shape[1] and x.shape[1] % 2 == 0 and _alike(x, w)  # two numbers are read as one word
    kernels = kernels_for(x) if fits else None
    return (w @ x.T).T if kernels is None else kernels.narrow(x, w)


def widen(low: Tensor, w: Tensor, y: Tensor) -> None:
    """y += low W."""
    low = low.contiguous()
    if _fits(low, w, y) and (kernels := kernels_for(y)):
        kernels.widen(low, w, y)
    else:
        y.addmm_(low, w)


def outer(low: Tensor, x: Tensor) -> Tensor:
    """low^T x, (r, n), in fp32 where the kernels compute it, else in the precision of x."""
    fits = low.shape[0] == x.shape[0] and low.dtype == x.dtype and x.is_contiguous()
    kernels = kernels_for(x) if fits else None
    return low.T @ x if kernels is None else kernels.outer(low.contiguous(), x)


def by_column(g: Tensor, x: Tensor) -> Tensor:
    """Each column's sum of g x, (n,) of two (T, n), in fp32."""
    fits = g.shape == x.shape and _alike(g, x)
    kernels = kernels_for(x) if fits else None
    return (g * x).sum(0, dtype=torch.float32) if kernels is None else kernels.norm_weight(g, x, None)


def _for_product(x: Tensor, w: Tensor | FourBits, out: Tensor, bias: Tensor | None) -> Kernels | None:
    """The kernels, where such a product can be theirs; PyTorch says what is wrong with shapes that do not fit."""
    dense = None if isinstance(w, FourBits) else w
    others = [one for one in (out, dense, bias) if one is not None]
    if any(one.dtype != x.dtype or type(one) not in (Tensor, torch.nn.Parameter) for one in others):
        return None
    n, m = w.shape
    if n % 2 or x.shape[1] != n or out.shape != (x.shape[0], m) or (bias is not None and bias.shape != (m,)):
        return None
    by_columns_or_rows = dense is None or dense.is_contiguous() or dense.T.is_contiguous()
    return kernels_for(x) if by_columns_or_rows and x.is_contiguous() and out.is_contiguous() else None


def _beside(thin: Thin | None, out: Tensor) -> Thin | None:
    """What a product takes along: thin matrices of an even number of rows."""
    return thin if thin is not None and thin[1].shape[0] % 2 == 0 and _fits(*thin, out) else None


def _fits(low: Tensor, w: Tensor, y: Tensor) -> bool:
    return low.shape == (y.shape[0], w.shape[0]) and y.shape[1] == w.shape[1] and _alike(low, w, y)


def _alike(*tensors: Tensor) -> bool:
    return len({one.dtype for one in tensors}) == 1 and all(one.is_contiguous() for one in tensors)
