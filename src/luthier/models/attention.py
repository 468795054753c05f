"""Attention over packed sequences, plugged into transformers as one more implementation.

A batch is one row of T tokens; each sequence in it is attended on its own, so a neighbour can never
leak in and no padded token is ever computed. The same function serves decoding, where every row
has its keys and values in a `RowCache`.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from luthier.models.prefix import Prefixes

NAME = "luthier_packed"

# An accelerator runs rows as one padded call, which costs fewer launches than a call a row, unless padding more than doubles them.
_MOST_PADDED = 2

# Above this many tokens the (L, L) score matrix costs more than the fused kernel's slower backward.
_LONGEST_EXPLICIT = 1024

# The device that a skeleton's tensors, which are on none, stand for.
stands_for: ContextVar[str] = ContextVar("stands_for", default="cpu")


class RowCache:
    """Keys and values of the rows being decoded, preallocated: per layer (rows, heads, capacity, d)."""

    is_compileable = False
    is_sliding = (False,)

    def __init__(self, lengths: tuple[int, ...], new_tokens: int, prefixes: Prefixes | None = None):
        self.lengths = lengths  # of the prompts
        self.prefixes = prefixes
        before = prefixes.lengths if prefixes else (0,) * len(lengths)
        self.prompt_lengths = tuple(one + more for one, more in zip(before, lengths, strict=True))  # prefixes included
        self.capacity = max(self.prompt_lengths) + new_tokens
        self.filled: Tensor | None = None  # (rows,) tokens held by each row; None until the prompts are in
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return what this step attends to (transformers' cache contract)."""
        if self.filled is None:
            self._store_prompts(key, value, layer)
            return key, value
        rows = torch.arange(key.shape[0], device=key.device)
        self.keys[layer][rows, :, self.filled] = key[:, :, 0]
        self.values[layer][rows, :, self.filled] = value[:, :, 0]
        longest = int(self.longest) + 1
        return self.keys[layer][:, :, :longest], self.values[layer][:, :, :longest]

    def _store_prompts(self, key: Tensor, value: Tensor, layer: int) -> None:
        shape = (len(self.prompt_lengths), key.shape[1], self.capacity, key.shape[3])
        self.keys[layer], self.values[layer] = key.new_zeros(shape), value.new_zeros(shape)
        start = 0
        for row, (length, filled) in enumerate(zip(self.lengths, self.prompt_lengths, strict=True)):
            here, own = slice(start, start + length), slice(filled - length, filled)
            self.keys[layer][row, :, own], self.values[layer][row, :, own] = key[0, :, here], value[0, :, here]
            if self.prefixes and (prefix := self.prefixes.at(layer, row, key)):
                before = filled - length
                self.keys[layer][row, :, :before], self.values[layer][row, :, :before] = prefix[0][0], prefix[1][0]
            start += length

    def prompts_are_in(self, device: torch.device) -> None:
        """From here on each update is one new token a row."""
        self.filled = torch.tensor(self.prompt_lengths, device=device)
        self.longest = max(self.prompt_lengths)

    def advance(self) -> None:
        """Count the token that the last step stored."""
        assert self.filled is not None
        self.filled = self.filled + 1
        self.longest += 1

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these: finished rows leave the batch."""
        assert self.filled is not None
        self.filled = self.filled[rows]
        self.longest = int(self.filled.max())
        for layer in self.keys:
            self.keys[layer] = self.keys[layer][rows]
            self.values[layer] = self.values[layer][rows]

    def get_seq_length(self, *args: Any) -> int:
        """Part of transformers' cache contract; positions are always given explicitly."""
        return 0


@dataclass
class Packing:
    """How the tokens of one forward pass divide into rows; handed to every attention layer."""

    lengths: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...] = ()
    cache: RowCache | None = None
    prefixes: Prefixes | None = None
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    indices: tuple[Tensor, Tensor] | None = None

    def padded(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where the rows' tokens stand once padded at their ends: (rows * longest,) to take, and (T,) to take back."""
        if self.indices is None:
            lengths, longest = torch.tensor(self.lengths), max(self.lengths)
            places = torch.arange(longest)
            starts = lengths.cumsum(0) - lengths
            # Padding repeats a row's last token: causal attention never looks behind a query.
            take = (starts[:, None] + torch.minimum(places[None, :], lengths[:, None] - 1)).flatten()
            back = torch.nonzero((places[None, :] < lengths[:, None]).flatten())[:, 0]
            self.indices = take.to(device), back.to(device)
        return self.indices

    @property
    def decoding(self) -> bool:
        """One new token a row, keys and values from the cache."""
        return self.cache is not None and self.cache.filled is not None


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, T, d), or (rows, H, 1, d) when decoding
    key: Tensor,  # (1, K, T, d), or (rows, K, L, d)
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each row to itself; returns (1, T, H, d), or (rows, 1, H, d)."""
    assert packing is not None, "a packed model was called without its packing"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packing.decoding:
        out = _attend_cached(query, key, value, scale, softcap, sliding_window, packing)
        return out.transpose(1, 2), None
    where = stands_for.get() if query.is_meta else query.device.type
    if _as_one_call(packing, where, softcap, sliding_window):
        return _together(query, key, value, packing, scale, dropout), None
    if where == "cpu" and query.dtype == torch.bfloat16 and _written_out(packing, softcap, dropout):
        masks = [
            _mask(packing, length, packing.branches[row] if packing.branches else (), sliding_window, query)
            for row, length in enumerate(packing.lengths)
        ]
        return _Rows.apply(query, key, value, packing.lengths, masks, scale), None
    pieces, start = [], 0
    for row, length in enumerate(packing.lengths):
        here = slice(start, start + length)
        branches = packing.branches[row] if packing.branches else ()
        q, k, v = query[:, :, here], key[:, :, here], value[:, :, here]
        prefix = packing.prefixes.at(module.layer_idx, row, k) if packing.prefixes else None  # type: ignore[arg-type]
        if prefix:
            k, v = torch.cat([prefix[0], k], dim=2), torch.cat([prefix[1], v], dim=2)
        before = k.shape[2] - length
        window = sliding_window if sliding_window is not None and sliding_window < before + length else None
        plain = not branches and window is None and not before
        explicit = where == "cpu" and q.dtype == torch.bfloat16 and length <= _LONGEST_EXPLICIT
        if plain and not explicit and softcap is None:
            pieces.append(_fused(q, k, v, scale, dropout))
        else:
            mask = _mask(packing, length, branches, window, q, before)
            pieces.append(_attend(q, k, v, mask, scale, softcap, dropout))
        start += length
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _as_one_call(packing: Packing, where: str, softcap: float | None, window: int | None) -> bool:
    """Whether all rows are attended in one padded call: plain causal rows of about one length on an accelerator."""
    rows, longest = len(packing.lengths), max(packing.lengths)
    if where == "cpu" or rows == 1 or any(packing.branches) or packing.prefixes or softcap is not None:
        return False
    return (window is None or window >= longest) and rows * longest <= _MOST_PADDED * sum(packing.lengths)


def _written_out(packing: Packing, softcap: float | None, dropout: float) -> bool:
    """Whether every row's scores are best computed whole, as 16-bit products of two matrices."""
    return not packing.prefixes and softcap is None and not dropout and max(packing.lengths) <= _LONGEST_EXPLICIT


class _Rows(torch.autograd.Function):
    """softmax(s Q K^T + mask) V for each row, its scores written out; the softmax is in fp32, as transformers' is.

    One function for all rows, because the gradient of a slice is a tensor of the whole size.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], masks: list[Tensor], scale: float
    ) -> Tensor:
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])  # (1, T, H, d)
        kept, start = [], 0
        for length, mask in zip(lengths, masks, strict=True):
            here = slice(start, start + length)
            scores = torch.bmm(_stacked(query, here, key.shape[1]).mul_(scale), key[0, :, here].transpose(1, 2))
            scores.view(-1, length, length).add_(mask)
            weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
            out[0, here] = torch.bmm(weights, value[0, :, here]).view(-1, length, query.shape[3]).transpose(0, 1)
            kept.append(weights)
            start += length
        ctx.save_for_backward(query, key, value, *kept)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        upstream = outputs[0].transpose(1, 2)  # (1, H, T, d)
        query, key, value, *kept = ctx.saved_tensors
        into_query, into_key, into_value = map(torch.empty_like, (query, key, value))
        groups, width, start = key.shape[1], query.shape[3], 0
        for length, weights in zip(ctx.lengths, kept, strict=True):
            here = slice(start, start + length)
            own = _stacked(upstream, here, groups)
            into_value[0, :, here] = torch.bmm(weights.transpose(1, 2), own)
            into_weights = torch.bmm(own, value[0, :, here].transpose(1, 2))
            into_scores = torch.ops.aten._softmax_backward_data(into_weights, weights, -1, weights.dtype)
            into_rows = torch.bmm(into_scores, key[0, :, here]).mul_(ctx.scale)
            into_query[0, :, here] = into_rows.view(-1, length, width)
            stacked = _stacked(query, here, groups).mul_(ctx.scale)
            into_key[0, :, here] = torch.bmm(into_scores.transpose(1, 2), stacked)
            start += length
        return into_query, into_key, into_value, None, None, None


def _stacked(heads: Tensor, here: slice, groups: int) -> Tensor:
    """A copy of some tokens, the heads that share a key head one under the other: (K, H / K * L, d)."""
    return heads[0, :, here].clone(memory_format=torch.contiguous_format).view(groups, -1, heads.shape[3])


def _together(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, dropout: float) -> Tensor:
    """All rows in one call of the fused kernel, padded at their ends; (1, T, H, d)."""
    take, back = packing.padded(query.device)

    def rows(one: Tensor) -> Tensor:  # (1, H, T, d) to (rows, H, longest, d)
        return one[0].index_select(1, take).unflatten(1, (len(packing.lengths), -1)).transpose(0, 1)

    out = _fused(rows(query), rows(key), rows(value), scale, dropout)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, back)[None]


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> Tensor:
    if query.is_meta:  # PyTorch would take its plain attention there, which keeps every score
        aten = torch.ops.aten
        cpu = stands_for.get() == "cpu"
        kernel = aten._scaled_dot_product_flash_attention_for_cpu if cpu else aten._scaled_dot_product_flash_attention
        out: Tensor = kernel(query, key, value, is_causal=True, scale=scale)[0]
        return out
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=True
    )


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None, dropout: float
) -> Tensor:
    """Attention with its scores written out; grouped heads share one product with their key head."""
    rows, heads, length, width = query.shape
    groups, seen = key.shape[1], key.shape[2]
    stacked = (query * scale).reshape(rows, groups, heads // groups * length, width)
    scores = (stacked @ key.transpose(2, 3)).view(rows, heads, length, seen)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = F.dropout((scores + mask).softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
    return (weights.view(rows, groups, heads // groups * length, seen) @ value).view(rows, heads, length, width)


def _attend_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    packing: Packing,
) -> Tensor:
    cache = packing.cache
    assert cache is not None and cache.filled is not None
    slot = ("decode", window)
    if slot not in packing.masks:  # one mask serves all layers of this step
        places = torch.arange(key.shape[2], device=key.device)
        hidden = places > cache.filled[:, None]
        if window is not None:
            hidden = hidden | (places <= cache.filled[:, None] - window)
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=key.device).masked_fill(hidden, float("-inf"))
        packing.masks[slot] = mask[:, None, None, :]
    return _attend(query, key, value, packing.masks[slot], scale, softcap, 0.0)


def _mask(
    packing: Packing, length: int, branches: tuple[int, ...], window: int | None, like: Tensor, before: int = 0
) -> Tensor:
    """(L, P + L) additive mask: causal, within the window, and no branch sees another; all see the prefix."""
    slot = (length, branches, window, before)
    if slot not in packing.masks:
        places = torch.arange(length, device=like.device)
        owner = torch.zeros(length, dtype=torch.long, device=like.device)
        position = places.clone()
        start = shared = length - sum(branches)
        for number, branch in enumerate(branches, 1):
            owner[start : start + branch] = number
            position[start : start + branch] = places[:branch] + shared
            start += branch
        seen = places[None, :] <= places[:, None]
        seen &= (owner[None, :] == 0) | (owner[None, :] == owner[:, None])
        seen = torch.cat([seen.new_ones(length, before), seen], dim=1)
        if window is not None:
            columns = torch.cat([torch.arange(-before, 0, device=like.device), position])
            seen &= position[:, None] - columns[None, :] < window
        mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
        packing.masks[slot] = mask.masked_fill(~seen, float("-inf"))
    return packing.masks[slot]


AttentionInterface.register(NAME, packed_attention)
