"""Cross-entropy at target positions, chunked so that the logits never exist whole.

    L = - sum_i log softmax(head(h_i))[label_i]

A sum, with its count: whoever steps divides by the global count, so that micro-batches, accumulation
and ranks never change the gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from luthier.models.base import BaseModel
from luthier.models.batch import Batch
from luthier.models.frozen import target_states_behind
from luthier.models.kernels.calls import Kernels, kernels_for
from luthier.models.products import Product
from luthier.models.run import target_states

# Rows of the head's product computed at once, at most: (CHUNK, vocabulary) numbers are the largest tensors alive.
CHUNK = 128
# The same where a kernel takes the loss and writes its gradient over the logits, which stand where blocks have what they need for a moment:
# fewer rows would read the head's weight, or write its gradient, more often; more would be larger than what blocks need.
BY_KERNELS = 192


def loss_sum(base: BaseModel, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Summed cross-entropy (nats) of a batch's labels, differentiable; `label_smoothing` is the share of all tokens."""
    states = target_states(base, batch) if batch.states is None else target_states_behind(base, batch)
    return head_loss(base, states, batch.labels, label_smoothing)


def head_loss(base: BaseModel, states: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The same of states (N, D) and their labels (N,)."""
    head = base.bare_head() if base.on_cpu else None
    weights = base.head_parameters() if head is None else head.trained
    if head is not None:
        head.scratch = base.scratch.lent()
    return _HeadLoss.apply(states, labels, base, head, label_smoothing, *weights)  # type: ignore[no-any-return]


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
        del logits  # before the next ones are made
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
        ctx: Any,
        states: Tensor,
        labels: Tensor,
        base: BaseModel,
        head: Product | None,
        smoothing: float,
        *weights: Tensor,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        size = _chunk(base, len(labels), BY_KERNELS if kernels_for(states) else CHUNK)
        found: list[list[Tensor]] = []
        wanted = states.requires_grad or bool(weights)
        for chunk, targets in zip(states.split(size), labels.split(size), strict=True):
            if head is None:
                loss, gradients = _by_autograd(base, chunk, targets, smoothing, wanted, weights)
            else:
                loss, gradients = _by_product(head, chunk, targets, smoothing, wanted)
            total += loss
            if found:
                for sum_, more in zip(found[0][1:], gradients[1:], strict=True):
                    sum_ += more
                gradients = gradients[:1]
            found.append(gradients)
        ctx.save_for_backward(*([torch.cat([one[0] for one in found]), *found[0][1:]] if wanted else []))
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        """In their places: a head's gradient is the largest tensor there is. A second pass back is an error by autograd's own count."""
        (upstream,) = outputs
        for gradient in (kept := ctx.saved_tensors):
            gradient.mul_(upstream.to(gradient.dtype))
        return (kept[0], None, None, None, None, *kept[1:])


def _by_autograd(
    base: BaseModel, states: Tensor, labels: Tensor, smoothing: float, wanted: bool, weights: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The summed loss, and where they are wanted the gradients of the states and of the head's weights."""
    with torch.set_grad_enabled(wanted):
        piece = states.detach().requires_grad_(wanted)
        logits = base.logits(piece)
    loss, into_logits = _cross_entropy(logits.detach(), labels, smoothing, wanted)
    return loss, list(torch.autograd.grad(logits, [piece, *weights], into_logits)) if wanted else []


def _by_product(
    head: Product, states: Tensor, labels: Tensor, smoothing: float, wanted: bool
) -> tuple[Tensor, list[Tensor]]:
    """The same of a head that is one product, its logits where blocks have what they need for a moment."""
    states = states.contiguous()
    assert head.scratch is not None
    logits = head.scratch.moment(len(states) * head.width, states).view(len(states), -1)
    kept = head.forward(states, logits)
    loss, into_logits = _cross_entropy(logits, labels, smoothing, wanted)
    if into_logits is None:
        return loss, []
    into = torch.empty_like(states)
    return loss, [into, *head.backward(into_logits, states, kept, into)]  # type: ignore[list-item]
