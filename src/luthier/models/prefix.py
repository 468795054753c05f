"""Key/value prefixes: positions in front of a row that exist in attention only.

    keys   = [k_1 ... k_P, K h_1 ... K h_T]        k, v: a tuning's own, for every decoder layer
    values = [v_1 ... v_P, V h_1 ... V h_T]        the row's tokens stand at positions P ... P + T - 1

The keys are taken as they are: no position is rotated into them. Rows of one batch may have different
prefixes, or none.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache


class Prefix(nn.Module):
    """What a prefix graft computes: ``forward()`` gives (layers, 2, K, P, d), keys before values."""


@dataclass(frozen=True)
class Prefixes:
    """The prefix of each row of a batch: (layers, 2, K, P, d), or None; rows of one tuning share one tensor."""

    states: tuple[Tensor | None, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """P of each row, 0 where there is none."""
        return tuple(0 if one is None else one.shape[3] for one in self.states)

    def at(self, layer: int, row: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """A row's (keys, values) in one layer, each (1, K, P, d) in the precision of `like`."""
        states = self.states[row]
        if states is None:
            return None
        keys, values = states[layer].to(like.dtype)[:, None]
        return keys, values

    def cache(self, dtype: torch.dtype, encoder_decoder: bool) -> tuple[Any, Tensor]:
        """transformers' cache that holds the prefixes, and their mask (rows, longest P).

        Shorter ones stand behind masked places, so that every row's own tokens follow its prefix at once.
        """
        longest = max(self.lengths)
        some = next(one for one in self.states if one is not None)
        layers, _, heads, _, width = some.shape
        padded = []
        mask = torch.zeros(len(self.states), longest, dtype=torch.long, device=some.device)
        for row, (own, length) in enumerate(zip(self.states, self.lengths, strict=True)):
            empty = some.new_zeros(layers, 2, heads, longest - length, width)
            padded.append(empty if own is None else torch.cat([empty, own], dim=3))
            mask[row, longest - length :] = 1
        stacked = torch.stack(padded, dim=2).to(dtype)  # (layers, 2, rows, K, longest, d)
        own_cache = DynamicCache([(layer[0], layer[1]) for layer in stacked])
        return (EncoderDecoderCache(own_cache, DynamicCache()) if encoder_decoder else own_cache), mask
