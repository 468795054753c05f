"""Attention over packed sequences, plugged into transformers as one more implementation.

A batch is one row of T tokens; each sequence in it is attended on its own, so a neighbour can never
leak in and no padded token is ever computed; what rows begin with alike may stand there once. The same function
serves decoding, where every row has its keys and values in a `RowCache`.
"""

import inspect
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from luthier.models.attended import Attended, attend
from luthier.models.kernels.fused import Fused, runs_fused
from luthier.models.packing import Packing, Piece
from luthier.models.padded_rows import padded, unpadded
from luthier.models.where import kind_of, stands_for
from luthier.models.written_out import WrittenOut, rounded_up

NAME = "luthier_packed"

_varlen_attn: Any = None
with suppress(ImportError):  # PyTorch before 2.10
    from torch.nn.attention.varlen import varlen_attn as _varlen_attn
# Heads share key heads in any version; later ones ask whether that is meant.
_GROUPED = {"enable_gqa": True} if _varlen_attn and "enable_gqa" in inspect.signature(_varlen_attn).parameters else {}

# An accelerator runs rows as one padded call, which costs fewer launches than a call a row, unless padding more than doubles them.
_MOST_PADDED = 2

# Above this many tokens the (L, L) score matrix costs more than the fused kernel's slower backward.
_LONGEST_EXPLICIT = 1024


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
        out = _attend_cached(module, query, key, value, scale, softcap, sliding_window, packing)
        return out.transpose(1, 2), None
    where = kind_of(query)
    if _by_lengths(packing, where, query.dtype, softcap, dropout) and _flash_runs(query.shape[-1]):
        return _at_lengths(query, key, value, packing, scale, sliding_window), None
    if _as_one_call(packing, where, softcap, sliding_window):
        return _together(query, key, value, packing, scale, dropout), None
    plain = softcap is None and not dropout
    if plain and (attended := attended_by(packing, sliding_window, scale, query, query.shape[-1])):
        return attend(query, key, value, attended), None
    explicit = _is_explicit(packing, where, query.dtype)
    outputs = []
    for piece in packing.pieces:
        q, k, v = query[:, :, piece.own], piece.of(key), piece.of(value)
        prefix = packing.prefixes.at(module.layer_idx, piece.row, k) if packing.prefixes else None  # type: ignore[arg-type]
        if prefix:
            k, v = torch.cat([prefix[0], k], dim=2), torch.cat([prefix[1], v], dim=2)
        before = k.shape[2] - piece.seen
        narrow = sliding_window is not None and sliding_window < k.shape[2]
        if k.shape[2] == piece.length and not narrow and not explicit and softcap is None:
            outputs.append(_fused(q, k, v, scale, dropout))
        else:
            mask = _mask(packing, piece, before, sliding_window, q)
            outputs.append(_attend(q, k, v, mask, scale, softcap, dropout))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def attended_by(packing: Packing, window: int | None, scale: float, like: Tensor, width: int) -> Attended | None:
    """How rows, of heads of this width, are attended by a function whose gradient is written out; None where they are not."""
    if packing.prefixes:
        return None
    if runs_fused(like, width):
        return Fused(packing.pieces, packing.plan, scale, causal=True, window=window)
    if _is_explicit(packing, kind_of(like), like.dtype):
        masks = [_mask(packing, part, 0, window, like, rounded=True) for part in packing.parts]
        return WrittenOut(packing.parts, masks, scale)
    return None


def _is_explicit(packing: Packing, where: str, dtype: torch.dtype) -> bool:
    return where == "cpu" and dtype == torch.bfloat16 and packing.longest <= _LONGEST_EXPLICIT


def _by_lengths(packing: Packing, where: str, dtype: torch.dtype, softcap: float | None, dropout: float) -> bool:
    """Whether the kernel that takes the rows' lengths can run them: plain rows in 16 bits on CUDA."""
    if _varlen_attn is None or where != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return not (any(packing.branches) or packing.prefixes or softcap is not None or dropout)


def _flash_runs(width: int) -> bool:
    """Whether this accelerator has flash attention for heads of this width: from Ampere on, up to 256 numbers."""
    return width <= 256 and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _at_lengths(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, window: int | None
) -> Tensor:
    """All rows in one call, nothing padded; (1, T, H, d)."""
    ends, longest = packing.ends(query.device), max(packing.lengths)
    flat = [one[0].transpose(0, 1) for one in (query, key, value)]
    behind = -1 if window is None else window - 1
    out: Tensor = _varlen_attn(*flat, ends, ends, longest, longest, scale=scale, window_size=(behind, 0), **_GROUPED)
    return out[None]


def _as_one_call(packing: Packing, where: str, softcap: float | None, window: int | None) -> bool:
    """Whether all rows are attended in one padded call: plain causal rows of about one length on an accelerator."""
    rows, longest = len(packing.lengths), max(packing.lengths)
    if where == "cpu" or rows == 1 or any(packing.branches) or packing.prefixes or softcap is not None:
        return False
    return (window is None or window >= longest) and rows * longest <= _MOST_PADDED * sum(packing.lengths)


def _together(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, dropout: float) -> Tensor:
    """All rows in one call of the fused kernel, padded at their ends; (1, T, H, d)."""
    layout, rows = packing.padded(query.device), len(packing.lengths)

    def heads(one: Tensor) -> Tensor:  # (1, H, T, d) to (rows, H, longest, d)
        return padded(one[0].transpose(0, 1), layout).unflatten(0, (rows, -1)).transpose(1, 2)

    out = _fused(heads(query), heads(key), heads(value), scale, dropout)
    return unpadded(out.transpose(1, 2).flatten(0, 1), layout)[None]


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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    dropout: float,
    shared: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention with its scores written out; grouped heads share one product with their key head, and all rows one with keys
    and values (1, K, P, d) that are `shared`, which stand before their own.
    """
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    stacked = (query * scale).reshape(rows, groups, heads // groups * length, width)
    scores = stacked @ key.transpose(2, 3)
    if shared:
        scores = torch.cat([_times(stacked, shared[0].transpose(2, 3)), scores], dim=-1)
    scores = scores.view(rows, heads, length, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = F.dropout((scores + mask).softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
    weights = weights.view(rows, groups, heads // groups * length, -1)
    before = shared[1].shape[2] if shared else 0
    out = weights[..., before:] @ value
    if shared:
        out = out + _times(weights[..., :before], shared[1])
    return out.view(rows, heads, length, width)


def _times(rows: Tensor, one: Tensor) -> Tensor:
    """(rows, K, n, a) times (1, K, a, b) as K products, each of all rows."""
    return (rows.transpose(0, 1).flatten(1, 2) @ one[0]).unflatten(1, (len(rows), -1)).transpose(0, 1)


def _attend_cached(
    module: nn.Module,
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
        places = torch.arange(cache.before + key.shape[2], device=key.device)
        hidden = places > cache.filled[:, None]
        if window is not None:
            hidden = hidden | (places <= cache.filled[:, None] - window)
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=key.device).masked_fill(hidden, float("-inf"))
        packing.masks[slot] = mask[:, None, None, :]
    shared = cache.shared(module.layer_idx)  # type: ignore[arg-type]
    return _attend(query, key, value, packing.masks[slot], scale, softcap, 0.0, shared)


def _mask(
    packing: Packing, piece: Piece, before: int, window: int | None, like: Tensor, rounded: bool = False
) -> Tensor:
    """(L, before + seen) additive mask: causal and within the window; all see the prefix and the shared part.

    `rounded` makes it as large as `written_out.py` makes scores; queries that are none see the first key.
    """
    length, seen = piece.length, before + piece.seen
    window = window if window is not None and window < seen else None
    slot = (length, seen, window, rounded)
    if slot not in packing.masks:
        shape = (rounded_up(length), rounded_up(seen)) if rounded else (length, seen)
        queries = torch.arange(seen - length, seen - length + shape[0], device=like.device)[:, None]
        keys = torch.arange(shape[1], device=like.device)[None, :]
        hidden = keys > queries
        if window is not None:
            hidden |= queries - keys >= window
            hidden[length:, 0] = False
        mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
        packing.masks[slot] = mask.masked_fill(hidden, float("-inf"))
    return packing.masks[slot]


AttentionInterface.register(NAME, packed_attention)
