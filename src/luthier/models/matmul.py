"""Products of flat tensors, by the kernels or by PyTorch: with the weight of a linear, and with matrices of few rows, as LoRA's are.

x and y are (T, n), low is (T, r), thin matrices are (r, n). PyTorch computes what has r columns as its transpose, with r rows: on a CPU
four times faster.
"""

import torch
from torch import Tensor

from luthier.models.kernels.calls import Kernels, kernels_for
from luthier.models.kernels.library import has_matrix_units

# Not those that only look like tensors: divided over processes, or of a model that is watched.
_PLAIN = (Tensor, torch.nn.Parameter)

# What stands beside a linear: low and a thin matrix, whose product is added.
Thin = tuple[Tensor, Tensor]


def by_kernels(x: Tensor) -> bool:
    """Whether products of tensors like this one run by the kernels, to which all sizes are alike."""
    return not has_matrix_units() and kernels_for(x) is not None


def product(
    x: Tensor, w: Tensor, out: Tensor, bias: Tensor | None = None, thin: Thin | None = None, add: bool = False
) -> None:
    """x W + bias + low thin into `out`, or added to what is there: (T, n), (n, m), (m,), (T, r), (r, m) into (T, m)."""
    if kernels := _for_product(x, w, out, bias, thin):
        kernels.product(x, w, bias, None if thin is None else (thin[0].contiguous(), thin[1]), out, add)
        return
    if add:
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
    if by_kernels(x) and g.is_contiguous() and x.is_contiguous():
        kernels = kernels_for(x)
        assert kernels is not None
        return kernels.gradient(g, x)
    return g.T @ x


def narrow(x: Tensor, w: Tensor) -> Tensor:
    """x W^T, (T, r)."""
    kernels = _for_thin(x, w)
    return kernels.narrow(x, w) if kernels else (w @ x.T).T


def widen(low: Tensor, w: Tensor, y: Tensor) -> None:
    """y += low W."""
    if kernels := _for_thin(y, w):
        kernels.widen(low.contiguous(), w, y)
    else:
        y.addmm_(low, w)


def outer(low: Tensor, x: Tensor) -> Tensor:
    """low^T x, (r, n), in fp32 where the kernels compute it, else in the precision of x."""
    kernels = _for_thin(x, x)
    return kernels.outer(low.contiguous(), x) if kernels else low.T @ x


def _for_thin(x: Tensor, w: Tensor) -> Kernels | None:
    """The kernels, where they run on such matrices: two numbers of a row are read as one word."""
    fine = x.shape[1] % 2 == 0 and x.is_contiguous() and w.is_contiguous() and w.dtype == x.dtype
    return kernels_for(x) if fine else None


def _for_product(x: Tensor, w: Tensor, out: Tensor, bias: Tensor | None, thin: Thin | None) -> Kernels | None:
    if has_matrix_units() or w.dtype != x.dtype or len(w) % 2 or type(w) not in _PLAIN:
        return None
    if not (x.is_contiguous() and out.is_contiguous() and (w.is_contiguous() or w.T.is_contiguous())):
        return None
    if bias is not None and bias.dtype != x.dtype:
        return None
    if thin is not None and not (thin[1].shape[0] % 2 == 0 and thin[1].is_contiguous() and thin[1].dtype == x.dtype):
        return None
    return kernels_for(x)
