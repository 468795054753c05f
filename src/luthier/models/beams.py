"""Beam search over packed rows, as transformers' `generate` defines it.

Each row keeps `beams` partial answers. A step extends all of them by every token and takes the best; one that ends with a stop
token joins the row's finished answers, worth log-probability / length ** length_penalty, the stop token counted. A row
is done when none of its partial answers can beat its worst finished one.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from luthier.models.decoding import Decoding


@dataclass
class Beams:
    """The partial and finished answers of one row."""

    decoding: Decoding
    stop: set[int]
    new_tokens: int
    written: list[list[int]] = field(default_factory=lambda: [[]])
    scores: list[float] = field(default_factory=lambda: [0.0])
    finished: list[tuple[float, list[int]]] = field(default_factory=list)

    def extend(self, logits: Tensor) -> list[int]:
        """Extend every partial answer by one token; logits: (partial answers, vocabulary).

        Returns, for each new partial answer, the place of the one it extends; empty when the row is done.
        """
        width, length = self.decoding.beams, len(self.written[0]) + 1
        sums = logits.float().log_softmax(-1) + torch.tensor(self.scores, device=logits.device)[:, None]
        count = min(max(2, 1 + len(self.stop)) * width, sums.numel())
        best = sums.flatten().topk(count)
        parents: list[int] = []
        written: list[list[int]] = []
        scores: list[float] = []
        for rank, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            parent, token = divmod(place, sums.shape[1])
            if token in self.stop or length == self.new_tokens:
                if rank < width:  # a worse one would not have been kept either
                    ended = self.written[parent] + ([] if token in self.stop else [token])
                    self._finish(score / length**self.decoding.length_penalty, ended)
            elif len(parents) < width:
                parents.append(parent)
                written.append([*self.written[parent], token])
                scores.append(score)
        if length == self.new_tokens or not parents or self._decided(max(scores), length):
            return []
        self.written, self.scores = written, scores
        return parents

    def best(self) -> list[int]:
        """The best finished answer."""
        return max(self.finished, key=lambda one: one[0])[1]

    def _finish(self, score: float, ids: list[int]) -> None:
        self.finished.append((score, ids))
        self.finished.sort(key=lambda one: -one[0])
        del self.finished[self.decoding.beams :]

    def _decided(self, running: float, length: int) -> bool:
        """Whether all places are taken by answers that the best partial one, as it stands, does not reach."""
        if len(self.finished) < self.decoding.beams:
            return False
        penalty = self.decoding.length_penalty
        return self.finished[-1][0] >= running / length**penalty
