"""How far one model's answers are from another's on the same rows: what a merge certificate is made of.

At every target position, with the reference's distribution p and the candidate's q over the vocabulary:

    KL = sum p (log p - log q)       flip: argmax p != argmax q       logit difference: max |z_p - z_q|
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from luthier.encoding.batches import collate, micro_batches
from luthier.encoding.encoder import Encoded
from luthier.errors import UserError
from luthier.models.base import BaseModel
from luthier.models.run import target_states

# Both models' logits are alive at once: fewer tokens at a time than in scoring.
_TOKENS, _CHUNK = 2048, 256


@dataclass(frozen=True)
class Drift:
    """The candidate against the reference over `tokens` target positions; `kl` and the losses in nats a token.

    A candidate that gives what is no number is infinitely far away.
    """

    tokens: int
    largest_logit_difference: float
    kl: float
    flips: float  # share of positions, 0-1
    reference_loss: float
    loss: float

    def within(self, limit_kl: float, limit_flips: float) -> bool:
        """Whether the candidate may stand for the reference."""
        return math.isfinite(self.kl) and self.kl <= limit_kl and self.flips <= limit_flips


@torch.no_grad()
def drift(reference: BaseModel, candidate: BaseModel, rows: Sequence[Encoded]) -> Drift:
    """Compare two models, each with its tuning in use, on rows that neither was trained on. All sums are in fp64.

    Raises UserError where the reference itself gives what is no number: nothing can be compared with it.
    """
    count, largest, divergence, flips, losses, broken = 0, 0.0, 0.0, 0, [0.0, 0.0], False
    for group in micro_batches(rows, _TOKENS, padded=reference.pads):
        batch = collate(group, reference.decoder_start if reference.encoder_decoder else None)
        batch = batch.to(reference.device)
        states = [target_states(model, batch).split(_CHUNK) for model in (reference, candidate)]
        for ours, theirs, labels in zip(*states, batch.labels.split(_CHUNK), strict=True):
            logits = [reference.logits(ours).float(), candidate.logits(theirs).float()]
            if not logits[0].isfinite().all():
                raise UserError(
                    "The model to compare with gives NaN or infinite logits. Use another dtype for the base."
                )
            broken = broken or not logits[1].isfinite().all()
            largest = max(largest, float((logits[0] - logits[1]).abs().max()))
            flips += int((logits[0].argmax(-1) != logits[1].argmax(-1)).sum())
            p, q = (one.log_softmax(-1) for one in logits)
            divergence += float((p.exp() * (p - q)).sum(dtype=torch.float64))
            for place, scores in enumerate((p, q)):
                losses[place] -= float(scores.gather(1, labels[:, None]).sum(dtype=torch.float64))
            count += len(labels)
    kl = max(0.0, divergence / count)
    if broken:  # max() and min() are blind to NaN
        kl = largest = math.inf
    return Drift(count, largest, kl, flips / count, losses[0] / count, losses[1] / count)
