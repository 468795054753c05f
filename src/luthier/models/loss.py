"""Cross-entropy at target positions, chunked so that the logits never exist whole.

    L = - sum_i log softmax(head(h_i))[label_i]

A sum, with its count: whoever steps divides by the global count, so that micro-batches, accumulation
and ranks never change the gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from luthier.models.base import BaseModel
from luthier.models.batch import Batch
from luthier.models.frozen import target_states_behind
from luthier.models.kernels.calls import Kernels, kernels_for
from luthier.models.run import target_states

# Rows of the head's product computed at once, at most: (CHUNK, vocabulary) numbers are the largest tensors alive.
CHUNK = 128
# The same where a kernel takes the loss, with two such tensors of 16 bits: fewer rows would read the head's weight, or write its gradient,
# more often.
BY_KERNELS = 384


def loss_sum(base: BaseModel, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Summed cross-entropy (nats) of a batch's labels, differentiable; `label_smoothing` is the share of all tokens."""
    states = target_states(base, batch) if batch.states is None else target_states_behind(base, batch)
    return _HeadLoss.apply(states, batch.labels, base, label_smoothing, *base.head_parameters())  # type: ignore[no-any-return]


@torch.no_grad()
def label_scores(base: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability (nats) of each label, and whether it was the most probable token: both (N,)."""
    states = target_states(base, batch)
    scores, hits = [], []
    size = _chunk(base, len(batch.labels), CHUNK)
    for chunk, labels in zip(states.split(size), batch.labels.split(size), strict=True):
        logits = base.logits(chunk)
        if kernels := _kernels(logits, labels):  # which copy nothing to fp32
            scores.append(-kernels.cross_entropy(logits, labels, 0.0, None))
        else:
            scores.append(-F.cross_entropy(logits.float(), labels, reduction="none"))
        hits.append(logits.argmax(-1) == labels)
    return torch.cat(scores), torch.cat(hits)


def _chunk(base: BaseModel, targets: int, most: int) -> int:
    """How many targets the head is applied to at once: mixed batches route it by target, so there to all."""
    parts = -(-targets // most) if len(base.grafts.route.parts) == 1 else 1
    return max(1, -(-targets // max(1, parts)))


def _kernels(logits: Tensor, labels: Tensor) -> Kernels | None:
    return kernels_for(logits) if labels.dtype == torch.int64 else None


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """The summed loss of logits (N, V), and its gradient where it is wanted: softmax - (1 - e) one-hot - e / V, computed in fp32.

    It takes the place of the logits. (Autograd is told, should it have kept them.)
    """
    if kernels := _kernels(logits, labels):
        into = logits if wanted else None
        losses = kernels.cross_entropy(logits, labels, smoothing, into)
        if wanted:
            increment_version(logits)
        return losses.sum(), into
    wide = logits.float()
    rows, size = torch.arange(len(labels), device=labels.device), wide.shape[1]
    wide -= wide.amax(1, keepdim=True)
    chosen = wide[rows, labels]
    mean = wide.mean(1) if smoothing else chosen
    sums = wide.exp_().sum(1)
    loss = (sums.log() - (1 - smoothing) * chosen - smoothing * mean).sum()
    if not wanted:
        return loss, None
    wide.div_(sums[:, None])
    if smoothing:
        wide -= smoothing / size
    wide[rows, labels] -= 1 - smoothing
    return loss, wide if wide is logits else logits.copy_(wide)


class _HeadLoss(torch.autograd.Function):
    """Computes gradients chunk by chunk while the logits are at hand, so nothing is kept or redone."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, labels: Tensor, base: BaseModel, smoothing: float, *weights: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        size = _chunk(base, len(labels), BY_KERNELS if kernels_for(states) else CHUNK)
        into_states: list[Tensor] = []
        into_weights: list[Tensor] = []
        wanted = states.requires_grad or bool(weights)
        for chunk, targets in zip(states.split(size), labels.split(size), strict=True):
            with torch.set_grad_enabled(wanted):
                piece = chunk.detach().requires_grad_(wanted)
                logits = base.logits(piece)
            loss, into_logits = _cross_entropy(logits.detach(), targets, smoothing, wanted)
            total += loss
            if wanted:
                first, *rest = torch.autograd.grad(logits, [piece, *weights], into_logits)
                into_states.append(first)
                for sum_, more in zip(into_weights, rest, strict=False):
                    sum_ += more
                into_weights = into_weights or rest
        ctx.save_for_backward(*([torch.cat(into_states), *into_weights] if wanted else []))
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        """In their places: a head's gradient is the largest tensor there is. A second pass back is an error by autograd's own count."""
        (upstream,) = outputs
        for gradient in (kept := ctx.saved_tensors):
            gradient.mul_(upstream.to(gradient.dtype))
        return (kept[0], None, None, None, *kept[1:])
