"""Attention through the kernels: scores are never whole, so that nothing but a number a query and head is kept of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.models.attended import Attended, Heads, WayBack
from luthier.models.kernels.calls import Kernels, kernels_for
from luthier.models.kernels.library import How
from luthier.models.packing import Piece, Plan
from luthier.models.scratch import Scratch


def runs_fused(like: Tensor, width: int) -> bool:
    """Whether rows like these, of heads of this width, can be attended by the kernels."""
    return width % 2 == 0 and kernels_for(like) is not None


class Fused(Attended):
    """`plan` is that of `pieces`; `window` the keys that a query sees at most, or None; `bias`, (H, longest, longest), is added to
    the scores, which are times `scale`.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        plan: Plan,
        scale: float,
        causal: bool,
        window: int | None = None,
        bias: Tensor | None = None,
    ):
        self.plan, self.scale, self.causal, self.window = plan, scale, causal, window
        self.bias = None if bias is None else bias.detach().contiguous()
        self.seen = sum(piece.length * piece.seen for piece in pieces)

    def forward(self, heads: Heads, out: Tensor, room: Tensor, scratch: Scratch) -> list[Tensor | None]:
        """Kept: the logarithms of sums of exponents (H, T)."""
        q, k, v = (_by_token(one) for one in heads)
        lse = out.new_empty(q.shape[1], len(q), dtype=torch.float32)
        self._kernels(q).attend(self.plan, self._how(q, k), (q, k, v), out[0], lse, 2 * self._work(q))
        return [lse]

    def backward(self, back: WayBack, scratch: Scratch) -> None:
        """Writes all gradients; keys that nobody sees keep the zeros."""
        q, k, v = (_by_token(one) for one in back.heads)
        (lse,) = back.kept
        assert lse is not None
        tensors = (q, k, v, back.out[0], _dense(back.upstream[0]), *(one[0].transpose(0, 1) for one in back.into))
        self._kernels(q).attend_backward(self.plan, self._how(q, k), tensors, lse, back.into_bias, 5 * self._work(q))

    def _how(self, q: Tensor, k: Tensor) -> How:
        row, address = (0, None) if self.bias is None else (self.bias.shape[1], self.bias.data_ptr())
        return How(q.shape[1], k.shape[1], q.shape[2], self.causal, self.window or 0, row, address, self.scale)

    def _work(self, q: Tensor) -> int:
        """Operations of one of its products."""
        return 2 * self.seen * q.shape[1] * q.shape[2] // (2 if self.causal else 1)

    def _kernels(self, q: Tensor) -> Kernels:
        found = kernels_for(q)
        assert found is not None
        return found


def _by_token(heads: Tensor) -> Tensor:
    """(1, H, T, d) as (T, H, d), each head's numbers side by side."""
    return _dense(heads[0].transpose(0, 1))


def _dense(heads: Tensor) -> Tensor:
    """With the last dimension contiguous, and other strides even: two numbers are read as one word."""
    fine = heads.stride(2) == 1 and heads.stride(0) % 2 == 0 and heads.stride(1) % 2 == 0
    return heads if fine else heads.contiguous()
