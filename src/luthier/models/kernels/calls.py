"""The kernels on tensors: bfloat16 on a CPU, contiguous, flat as (T, n). On a skeleton's tensors nothing is computed, only counted."""

import ctypes
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.models.kernels.library import BackwardOf, Heads, How, PlanOf, library
from luthier.models.packing import Plan
from luthier.models.where import kind_of

Three = tuple[Tensor, Tensor, Tensor]
SUMMED = 1 << 14  # numbers whose squares one thread adds up


class FourBits(NamedTuple):
    """A weight (out, in) in NormalFloat: number i is code[q_i] scale[i / 64]; `by_rows` where (in, out) is asked of it. Its rows are
    multiples of 64.
    """

    packed: Tensor
    scale: Tensor
    code: Tensor
    by_rows: bool
    shape: tuple[int, int]  # as it is asked of


class AdamW(NamedTuple):
    """What a step of AdamW is told: the factor of gradients, the rate and the share that decays, and how moments are kept."""

    scale: float
    rate: float  # corrected for the bias of the first moment
    decay: float
    beta1: float
    beta2: float
    root: float  # 1 / sqrt(1 - beta2^t): the correction of the second
    eps: float


# Who wants to know of the work of calls, which PyTorch does not see: operations in products, and bytes read and written.
counting: ContextVar[Callable[[int, int], None] | None] = ContextVar("counting", default=None)


def kernels_for(x: Tensor) -> "Kernels | None":
    """The kernels, where they run on tensors like this one."""
    found = _library_for(x)
    return None if found is None or isinstance(found, str) else Kernels(found)


def why_none(x: Tensor) -> str | None:
    """Why tensors like this one, which the kernels are for, run without them; None where they run, or are not for such."""
    found = _library_for(x)
    return found if isinstance(found, str) else None


def _library_for(x: Tensor) -> ctypes.CDLL | str | None:
    # Not those that only look like tensors: divided over processes, or watched by a compiler.
    fine = x.dtype == torch.bfloat16 and type(x) in (Tensor, torch.nn.Parameter) and (x.is_cpu or kind_of(x) == "cpu")
    return library() if fine else None


class Kernels:
    """The library's functions; each says in its C file what it computes."""

    def __init__(self, found: ctypes.CDLL):
        self.library = found

    def product(
        self,
        x: Tensor,
        w: Tensor | FourBits,
        bias: Tensor | None,
        thin: tuple[Tensor, Tensor] | None,
        out: Tensor,
        add: bool,
    ) -> None:
        """x W + bias + low thin, + what is in `out` if `add`: (T, n), (n, m), (m,), (T, r), (r, m) into (T, m).

        W may stand by rows or by columns; n and r are even.
        """
        weight: tuple[Tensor | None, ...]
        if isinstance(w, FourBits):
            by_rows, weight = w.by_rows, (None, w.packed, w.scale, w.code)
        else:
            by_rows = not w.is_contiguous()
            weight = w.T if by_rows else w, None, None, None
        low, matrix = thin or (None, None)
        rank = 0 if low is None else low.shape[1]
        sizes = (*x.shape, out.shape[1], rank, by_rows, add)
        self._call(
            "luthier_product", (x, *weight, bias, low, matrix, out), sizes, 2 * out.numel() * (x.shape[1] + rank)
        )

    def gradient(self, g: Tensor, x: Tensor) -> Tensor:
        """g^T x: (T, m), (T, n) to (m, n)."""
        into = x.new_empty(g.shape[1], x.shape[1])
        turned = x.new_empty(g.shape[1], g.shape[0] + g.shape[0] % 2)
        self._call("luthier_gradient", (g, x, into, turned), (x.shape[0], *into.shape), 2 * into.numel() * x.shape[0])
        return into

    def narrow(self, x: Tensor, w: Tensor) -> Tensor:
        """x W^T: (T, n), (r, n) to (T, r); n even."""
        low = x.new_empty(x.shape[0], w.shape[0])
        self._call("luthier_narrow", (x, w, low), (x.shape[0], x.shape[1], w.shape[0]), 2 * x.numel() * w.shape[0])
        return low

    def widen(self, low: Tensor, w: Tensor, y: Tensor) -> None:
        """y += low W: (T, r), (r, n) into (T, n)."""
        self._call("luthier_widen", (low, w, y), (y.shape[0], y.shape[1], w.shape[0]), 2 * y.numel() * w.shape[0])

    def outer(self, low: Tensor, x: Tensor) -> Tensor:
        """low^T x in fp32: (T, r), (T, n) to (r, n)."""
        into = x.new_empty(low.shape[1], x.shape[1], dtype=torch.float32)
        self._call(
            "luthier_outer", (low, x, into), (x.shape[0], x.shape[1], into.shape[0]), 2 * x.numel() * into.shape[0]
        )
        return into

    def norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor, scale: Tensor | None = None) -> Tensor:
        """RMSNorm of x into `out`; returns the scale (T, 1) in fp32, which is taken where it is given."""
        found = x.new_empty(x.shape[0], 1, dtype=torch.float32) if scale is None else scale
        self._call("luthier_norm", (x, weight, out, found), (*x.shape, eps, scale is not None))
        return found

    def norm_backward(self, upstream: Tensor, x: Tensor, scale: Tensor, weight: Tensor, skip: Tensor | None) -> Tensor:
        """The gradient of x, `skip` added."""
        into = torch.empty_like(x)
        self._call("luthier_norm_backward", (upstream, x, scale, weight, skip, into), x.shape)
        return into

    def norm_weight(self, upstream: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
        """The gradient of the norm's weight in fp32, (n,); without a scale, that of factors of x."""
        into = x.new_empty(x.shape[1], dtype=torch.float32)
        self._call("luthier_norm_weight", (upstream, x, scale, into), x.shape)
        return into

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, back: bool) -> None:
        """x, out: (T, H, d); cos, sin: (T, 1, d)."""
        self._call("luthier_rotate", (x, cos, sin, out), (*x.shape, -1 if back else 1))

    def cross_entropy(self, logits: Tensor, labels: Tensor, smoothing: float, into: Tensor | None) -> Tensor:
        """The losses (N,) in fp32 of logits (N, V), their gradient into `into`; labels (N,) int64."""
        losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
        self._call("luthier_cross_entropy", (logits, labels, losses, into), (*logits.shape, smoothing))
        return losses

    def activate(self, kind: int, g: Tensor, u: Tensor | None, out: Tensor) -> None:
        """act(g) * u into `out`."""
        self._call("luthier_activate", (g, u, out), (g.numel(),), kind=(kind,))

    def activate_backward(
        self, kind: int, upstream: Tensor, g: Tensor, u: Tensor | None, into_u: Tensor | None, again: Tensor | None
    ) -> None:
        """The gradient of u into `into_u`, which may be u, that of g into the upstream gradient's place, act(g) * u into `again`."""
        tensors = (upstream, g, u, upstream, into_u, again)
        self._call("luthier_activate_backward", tensors, (g.numel(),), kind=(kind,))

    def norm_of(self, x: Tensor) -> Tensor:
        """The norm of all numbers together in fp32, whatever the number of threads."""
        sums = x.new_empty(-(-x.numel() // SUMMED), dtype=torch.float32)
        self._call("luthier_squares", (x, sums), (x.numel(), SUMMED))
        return sums.sum(dtype=torch.float64).sqrt().float()

    def adamw(
        self, weight: Tensor, master: Tensor, moments: tuple[Tensor, Tensor], gradient: Tensor, how: AdamW
    ) -> None:
        """Steps `master` and the moments, in fp32, and rounds it into `weight`; all alike in shape."""
        self._call("luthier_adamw", (weight, master, *moments, gradient), (weight.numel(), *how))

    def attend(self, plan: Plan, how: How, heads: Three, out: Tensor, lse: Tensor, work: int) -> None:
        """Queries, keys, values (T, H, d) to out (T, H, d) and lse (H, T)."""
        if not _counted(out, (*heads, out), work):
            each = [_heads(one) for one in (*heads, out)]
            self.library.luthier_attend(_plan(plan), ctypes.byref(how), *each, lse.data_ptr(), lse.shape[1])

    def attend_backward(
        self, plan: Plan, how: How, tensors: tuple[Tensor, ...], lse: Tensor, into_bias: Tensor | None, work: int
    ) -> None:
        """`tensors` are q, k, v, out, upstream and the gradients of q, k, v, which are written."""
        places = plan.rows * how.key_heads * 2 * -(-how.width // 16) * 16
        sums = lse.new_empty(places) if places else None
        if not _counted(lse, tensors, work):
            way_back = BackwardOf(
                *(_heads(one) for one in tensors), *map(_address, (lse, into_bias, sums)), lse.shape[1], plan.rows
            )
            self.library.luthier_attend_backward(_plan(plan), ctypes.byref(how), ctypes.byref(way_back))

    def _call(self, name: str, tensors: tuple[Tensor | None, ...], rest: Any, work: int = 0, kind: Any = ()) -> None:
        if not all(one is None or one.is_contiguous() for one in tensors):
            raise ValueError(f"{name} takes contiguous tensors")
        if not _counted(tensors[0], tensors, work):
            getattr(self.library, name)(*kind, *map(_address, tensors), *rest)


def _counted(one: Tensor | None, tensors: tuple[Tensor | None, ...], work: int) -> bool:
    """Count a call where someone does; returns whether that is all, for tensors without numbers."""
    if count := counting.get():
        count(work, sum(each.numel() * each.itemsize for each in tensors if each is not None))
    return one is not None and one.is_meta


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _plan(plan: Plan) -> Any:
    tensors = plan.flat, plan.at, plan.units, plan.shared
    return ctypes.byref(PlanOf(*map(_address, tensors), len(plan.units) - 1, len(plan.shared) // 4))


def _heads(tensor: Tensor) -> Heads:
    return Heads(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))
