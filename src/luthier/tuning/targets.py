"""Which modules of a base a target pattern means."""

import fnmatch
import re
from collections.abc import Iterable, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.errors import UserError, nearest
from luthier.models.base import BaseModel
from luthier.models.parts import block_of, embeddings, head

LINEAR = (nn.Linear, Conv1D)


def match_modules(
    base: BaseModel,
    pattern: str | Sequence[str],
    kinds: tuple[type[nn.Module], ...],
    blocks: Sequence[int] | None = None,
) -> dict[str, nn.Module]:
    """Modules of the base that target patterns mean, by path; inside these blocks only, where `blocks` says.

    `all-linear` is every linear but the output head, `attention` the linears of attention, `embeddings` the token
    embeddings; otherwise a pattern is a shell pattern (``*.q_proj``), a regular expression that matches the whole
    path, or the end of a path (``q_proj``, ``self_attn.q_proj``). Blocks count from 0, or back from -1. An embedding of
    anything but tokens (positions) is meant by its whole path only: what it gives is shared by all rows of a batch.
    Raises UserError for a pattern that matches nothing, naming near misses.
    """
    patterns = [pattern] if isinstance(pattern, str) else pattern
    plain = {*embeddings(base), *patterns}
    candidates = {
        path: module
        for path, module in base.grafts.modules.items()
        if isinstance(module, kinds) and (path in plain or not isinstance(module, nn.Embedding))
    }
    chosen: dict[str, nn.Module] = {}
    for one in patterns:
        found = _found(base, one, candidates)
        if not found:
            endings = {path.rpartition(".")[2] for path in candidates}
            raise UserError(
                f"The target pattern {one!r} matches no module of this {base.family} model. "
                f"{nearest(one, endings)} Its modules of that kind end in: {', '.join(sorted(endings))}; "
                "`all-linear` takes every linear but the output head, `attention` those of attention."
            )
        chosen.update(found)
    return chosen if blocks is None else _inside(base, chosen, blocks)


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern means a path: by its end, as a shell pattern or as a regular expression of the whole."""
    if path == pattern or path.endswith(f".{pattern}") or fnmatch.fnmatchcase(path, pattern):
        return True
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error:
        return False


def _found(base: BaseModel, word: str, candidates: dict[str, nn.Module]) -> dict[str, nn.Module]:
    if word == "embeddings":
        return {path: module for path, module in embeddings(base).items() if path in candidates}
    if word in ("all-linear", "attention"):
        outside = head(base).keys()
        return {
            path: module
            for path, module in candidates.items()
            if isinstance(module, LINEAR)
            and path not in outside
            and (word == "all-linear" or _in_attention(path.split(".")[:-1]))
        }
    return {path: module for path, module in candidates.items() if matches(word, path)}


def _in_attention(parents: Iterable[str]) -> bool:
    return any("attn" in one.lower() or "attention" in one.lower() for one in parents)


def _inside(base: BaseModel, chosen: dict[str, nn.Module], blocks: Sequence[int]) -> dict[str, nn.Module]:
    if not blocks:
        raise UserError("layers is empty, so no target is left. Name blocks, or leave it out for all of them.")
    kept = {}
    places = {path: block_of(base, path) for path in chosen}
    most = max((place[1] for place in places.values() if place), default=base.blocks)
    if wrong := [one for one in blocks if not -most <= one < most]:
        raise UserError(
            f"layers: this {base.family} model has no block {', '.join(map(str, wrong))}, but blocks 0 to {most - 1}, or "
            f"-{most} to -1."
        )
    for path, module in chosen.items():
        place = places[path]
        if place and any(place[0] == (one if one >= 0 else one + place[1]) for one in blocks):
            kept[path] = module
    if not kept:
        raise UserError(
            f"No target stands in the blocks {', '.join(map(str, blocks))}: this {base.family} model has blocks 0 to "
            f"{base.blocks - 1}, or -{base.blocks} to -1."
        )
    return kept
