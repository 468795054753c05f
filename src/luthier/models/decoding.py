"""How the next token is chosen: the most probable one, a draw, or the best of several beams."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decoding:
    """How answers are written. The default is greedy.

    `temperature` above 0 draws each token, among the `top_k` most probable (0: all) and among the most probable that
    together reach `top_p` (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751); a text's draws follow from `seed` and its place
    among the texts, whatever the batches. `beams` above 1 keeps that many partial answers; a finished one is worth its
    log-probability divided by length ** `length_penalty`. `batch_size` rows are answered together; None: what suits the device.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.beams < 1:
            raise ValueError(f"beams is {self.beams}; it must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must not be negative (0 is greedy)")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must not be negative (0 is all)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.beams > 1 and self.temperature:
            raise ValueError("beams and temperature exclude each other: beams search, temperature draws")
        if self.length_penalty != 1 and self.beams == 1:
            raise ValueError(
                f"length_penalty is {self.length_penalty} and weighs the answers of beams: set beams above 1"
            )
        if (self.top_k or self.top_p < 1) and not self.temperature:
            raise ValueError("top_k and top_p narrow what is drawn from: set temperature above 0")


class Chooser:
    """Chooses tokens row by row; each row's draws are its own."""

    def __init__(self, decoding: Decoding, rows: Sequence[int]):
        self.decoding = decoding
        draws = rows if decoding.temperature else ()
        self.generators = [torch.Generator().manual_seed(_mixed(decoding.seed, row)) for row in draws]

    def __call__(self, logits: Tensor, alive: Sequence[int]) -> Tensor:
        """The next token of each row; logits: (rows, vocabulary), `alive` the rows' places among those given."""
        if not self.decoding.temperature:
            return logits.argmax(-1)
        probabilities = narrowed(logits.float() / self.decoding.temperature, self.decoding.top_k, self.decoding.top_p)
        draws = torch.stack([torch.rand((), generator=self.generators[place], dtype=torch.float64) for place in alive])
        sums = probabilities.double().cumsum(-1)
        # The first token whose sum exceeds the draw: one of probability 0 is never it.
        return torch.searchsorted(sums, draws.to(sums.device)[:, None] * sums[:, -1:], right=True)[:, 0]


def narrowed(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """(rows, vocabulary) probabilities, 0 outside the `top_k` most probable and the least set that reaches `top_p`."""
    if top_k and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        beyond = ranked.cumsum(-1) - ranked >= top_p  # what comes before it is enough
        probabilities = probabilities.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def _mixed(seed: int, row: int) -> int:
    """One seed of two numbers: neighbouring rows and seeds share no stream."""
    return (seed * 0x9E3779B97F4A7C15 + row * 0xBF58476D1CE4E5B9 + 1) % 2**63
