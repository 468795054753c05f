"""What a soft prompt is near to: each vector's neighbours in the vocabulary, and whether they form a group.

A trained vector is no token, and its neighbours may mislead (Khashabi et al. 2022, https://arxiv.org/abs/2112.08348): so
each number stands beside what chance gives, and whoever scores the task scores it also with the tokens in the prompt's place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.models.base import BaseModel

# Rows of the embedding table normalised at a time, and draws of what chance gives.
_ROWS, _DRAWS = 16384, 200


@dataclass(frozen=True)
class Neighbour:
    """A token of the vocabulary beside a vector: the cosine between them and their Euclidean distance."""

    id: int
    text: str
    cosine: float
    distance: float


@dataclass(frozen=True)
class VirtualToken:
    """One vector of the prompt, its nearest tokens by cosine first."""

    place: int
    norm: float
    neighbours: list[Neighbour]


@dataclass(frozen=True)
class PromptInspection:
    """A soft prompt read in the vocabulary's words.

    `chance_cosine` is the nearest token's cosine for vectors drawn with the embedding table's mean and spread;
    `group` the mean cosine between the different nearest tokens, `chance_group` that of as many random tokens, and
    `chance_of_group` the share of random groups at least as close (None for a single token).
    """

    tokens: list[VirtualToken]
    ids: list[int]
    text: str
    mean_cosine: float
    chance_cosine: float
    group: float | None
    chance_group: float | None
    chance_of_group: float | None


@torch.no_grad()
def inspect_prompt(base: BaseModel, name: str, neighbours: int = 5, seed: int = 0) -> PromptInspection:
    """Find what the soft prompt `name` is near to; random baselines are drawn from `seed`."""
    vectors = base.grafts.prompts[name].detach().float()  # (P, D)
    generator = torch.Generator().manual_seed(seed)
    with base.grafts.bare():
        table = base.embedding.weight.detach()
        cosines, ids = _nearest(vectors, table, neighbours)
        embedded = base.embedding(ids).float()  # Gemma multiplies what it looks up; a cosine does not see that
    tokens = []
    for place, vector in enumerate(vectors):
        near = []
        distances = (embedded[place] - vector).norm(dim=-1).tolist()
        for cosine, token, distance in zip(cosines[place].tolist(), ids[place].tolist(), distances, strict=True):
            near.append(Neighbour(token, base.tokenizer.decode([token]), cosine, distance))
        tokens.append(VirtualToken(place, float(vector.norm()), near))
    first = ids[:, 0].tolist()
    group = chance = share = None
    distinct = torch.tensor(sorted(set(first)), device=table.device)
    if len(distinct) > 1:
        group = _closeness(table[distinct])
        drawn = [torch.randperm(len(table), generator=generator)[: len(distinct)] for _ in range(_DRAWS)]
        found = torch.tensor([_closeness(table[one.to(table.device)]) for one in drawn])
        chance, share = float(found.mean()), float((found >= group).float().mean())
    return PromptInspection(
        tokens=tokens,
        ids=first,
        text=base.tokenizer.decode(first),
        mean_cosine=float(cosines[:, 0].mean()),
        chance_cosine=_chance_cosine(table, generator),
        group=group,
        chance_group=chance,
        chance_of_group=share,
    )


@contextmanager
def replaced_by_tokens(base: BaseModel, name: str, ids: list[int]) -> Iterator[None]:
    """Put the embeddings of tokens in the soft prompt's place, and the prompt back afterwards."""
    prompt = base.grafts.prompts[name]
    kept = prompt.detach().clone()
    with torch.no_grad(), base.grafts.bare():
        prompt.copy_(base.embedding(torch.tensor(ids, device=prompt.device)))
    try:
        yield
    finally:
        with torch.no_grad():
            prompt.copy_(kept)


def _nearest(vectors: Tensor, table: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosines and ids (P, count) of the nearest rows of the table."""
    count = min(count, len(table))
    unit = F.normalize(vectors.float(), dim=-1)
    found = torch.cat([unit @ F.normalize(rows.float(), dim=-1).T for rows in table.split(_ROWS)], dim=1)
    best: Any = found.topk(count, dim=1)
    return best.values, best.indices


def _closeness(rows: Tensor) -> float:
    """Mean cosine between different rows."""
    unit = F.normalize(rows.float(), dim=-1)
    count = len(rows)
    return float(((unit @ unit.T).sum() - count) / (count * (count - 1)))


def _chance_cosine(table: Tensor, generator: torch.Generator) -> float:
    sample = table[torch.randperm(len(table), generator=generator)[:4096].to(table.device)].float()
    drawn = torch.randn(_DRAWS, table.shape[1], generator=generator).to(table.device)
    return float(_nearest(drawn * sample.std(0) + sample.mean(0), table, 1)[0].mean())
