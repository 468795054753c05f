"""How a batch runs through a base: rows laid out packed or padded, soft prompts and prefixes before them, heads left out."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.errors import UserError
from luthier.models import biased
from luthier.models.base import BaseModel
from luthier.models.batch import Batch, Packed, Segment, row_parts, token_parts
from luthier.models.matmul import by_kernels
from luthier.models.noise import noisy
from luthier.models.packing import Packing, filler
from luthier.models.padding import kept_index, owner_rows, pad, pad_index
from luthier.models.prefix import Prefixes


def target_states(base: BaseModel, batch: Batch) -> Tensor:
    """Run a batch; return the states (N, D) that predict its labels."""
    segments = batch.segments
    if base.packs_pairs(segments):
        embedded, lengths, _ = embed(base, batch.source, segments)
        return decode_packed(base, batch, biased.run_encoder(base.model.get_encoder(), embedded, lengths), lengths)
    if base.encoder_decoder:
        return decode_targets(base, batch, *encode(base, batch.source, segments))
    states, shift, index = _run_decoder(base, batch.source, segments)
    if segments:
        _route_targets(base, batch, segments)
    targets = batch.targets
    if index is not None:  # padded rows
        return states.flatten(0, 1)[index[targets]]
    # The rows of one forked row all stand behind its one prompt.
    return states[0][targets + (shift[batch.owners] if len(shift) > 1 else shift)]


def embed(base: BaseModel, packed: Packed, segments: tuple[Segment, ...]) -> tuple[Tensor, tuple[int, ...], Tensor]:
    """Embed rows with their soft prompts in front: (T', D), new lengths, and the shift of each row's tokens."""
    if segments:
        assert segments[-1].stop == len(packed.lengths), "every row belongs to a segment"
        base.grafts.use_segments(segments, token_parts(segments, packed.lengths), axis=0)
    embedded: Tensor = base.embedding(packed.ids)
    if base.embedding_noise and torch.is_grad_enabled():
        embedded = noisy(embedded, packed.lengths, base.embedding_noise)
    names = [base.grafts.name_of(row, segments) for row in range(len(packed.lengths))]
    prompts = [base.grafts.prompts.get(name or "") for name in names]
    if all(prompt is None for prompt in prompts):
        return embedded, packed.lengths, torch.zeros(len(prompts), dtype=torch.long, device=embedded.device)
    pieces: list[Tensor] = []
    lengths: list[int] = []
    shifts: list[int] = []
    start = 0
    for length, prompt in zip(packed.lengths, prompts, strict=True):
        if prompt is not None:
            pieces.append(prompt.to(embedded.dtype))
        pieces.append(embedded[start : start + length])
        extra = 0 if prompt is None else prompt.shape[0]
        lengths.append(length + extra)
        shifts.append((shifts[-1] if shifts else 0) + extra)
        start += length
    return torch.cat(pieces), tuple(lengths), torch.tensor(shifts, device=embedded.device)


def run_packed(base: BaseModel, embedded: Tensor, positions: Tensor, packing: Packing) -> Tensor:
    """Run the decoder stack on (rows, T, D) embeddings in one packed layout; the head is left out."""
    cache = packing.cache
    out = base.model.get_decoder()(
        inputs_embeds=embedded,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
        packing=packing,
    )
    states: Tensor = out.last_hidden_state
    return states


def run_rows(base: BaseModel, embedded: Tensor, rows: Packed, prefixes: Prefixes | None = None) -> Tensor:
    """Run the decoder stack of a family that packs on the embeddings (T, D) of rows, laid out as `rows` says: states (T, D)."""
    tokens = len(embedded)
    one_tuning = len(base.grafts.route.parts) == 1
    extra = filler(tokens) if base.on_cpu and one_tuning and not prefixes and not by_kernels(embedded) else 0
    if extra:
        embedded = F.pad(embedded, (0, 0, 0, extra))
        rows = Packed(rows.ids, (*rows.lengths, extra), (*rows.branches, ()) if rows.branches else ())
    positions = torch.tensor(rows.positions(prefixes.lengths if prefixes else ()), device=embedded.device)[None]
    packing = Packing(rows.lengths, rows.branches, prefixes=prefixes)
    return run_packed(base, embedded[None], positions, packing)[0, :tokens]


def _run_decoder(
    base: BaseModel, packed: Packed, segments: tuple[Segment, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    embedded, lengths, shift = embed(base, packed, segments)
    grown = Packed(packed.ids, lengths, packed.branches)
    prefixes = base.grafts.prefixes_of(range(len(lengths)), segments)
    if base.packs:
        if segments:
            base.grafts.use_segments(segments, token_parts(segments, lengths), axis=1)
        return run_rows(base, embedded, grown, prefixes)[None], shift, None
    assert not packed.branches, "branches need a family that packs"
    if segments:
        base.grafts.use_segments(segments, row_parts(segments), axis=0)
    padded, mask = pad(embedded, lengths)
    options: dict[str, Any] = {"attention_mask": mask}
    if prefixes:
        options = behind(base, prefixes, mask)
    states = base.model.get_decoder()(inputs_embeds=padded, use_cache=False, **options).last_hidden_state
    index = kept_index(packed.lengths, lengths, states.shape[1], states.device)
    return states, shift, index


def behind(base: BaseModel, prefixes: Prefixes, mask: Tensor) -> dict[str, Any]:
    """What transformers' own decoder needs to run padded rows behind their prefixes: cache, mask and positions.

    Raises UserError while blocks are checkpointed: transformers takes the cache from those.
    """
    decoder = base.model.get_decoder()
    if any(getattr(one, "gradient_checkpointing", False) and one.training for one in decoder.modules()):
        raise UserError(
            f"gradient_checkpointing: the checkpointed blocks of a {base.family} model do not see a prefix. "
            "Set it to false for prefix_tuning."
        )
    cache, before = prefixes.cache(base.dtype, base.encoder_decoder)
    options = {"past_key_values": cache, "attention_mask": torch.cat([before, mask], dim=1)}
    if "position_ids" in inspect.signature(decoder.forward).parameters:
        options["position_ids"] = options["attention_mask"].cumsum(1)[:, before.shape[1] :].sub(1).clamp(min=0)
    return options


def encode(base: BaseModel, packed: Packed, segments: tuple[Segment, ...]) -> tuple[Tensor, Tensor]:
    """Run the encoder: padded states (rows, L, D) and their mask (rows, L)."""
    embedded, lengths, _ = embed(base, packed, segments)
    if segments:
        base.grafts.use_segments(segments, row_parts(segments), axis=0)
    padded, mask = pad(embedded, lengths)
    encoder = base.model.get_encoder()
    # Pegasus, Marian and others scale what they look up themselves, and nothing that they are given.
    padded = padded * getattr(encoder, "embed_scale", 1.0)
    encoded: Tensor = encoder(inputs_embeds=padded, attention_mask=mask).last_hidden_state
    return encoded, mask


def decode_targets(base: BaseModel, batch: Batch, encoded: Tensor, mask: Tensor) -> Tensor:
    """Run the decoder over encoded rows (rows, L, D); return the states (N, D) that predict the labels."""
    assert batch.decoder is not None
    rows, segments = batch.decoder_rows, batch.segments
    if rows != tuple(range(len(batch.source.lengths))):
        assert not segments, "several decoder rows per source row run through one tuning"
        take = torch.tensor(rows, device=encoded.device)
        encoded, mask = encoded[take], mask[take]
    lengths = batch.decoder.lengths
    ids, own = pad(batch.decoder.ids, lengths)
    # Padding stands behind every row, where causal attention never looks: no mask is needed without prefixes.
    prefixes = base.grafts.prefixes_of(rows, segments)
    options = behind(base, prefixes, own) if prefixes else {}
    states = base.model.get_decoder()(
        input_ids=ids, encoder_hidden_states=encoded, encoder_attention_mask=mask, use_cache=False, **options
    ).last_hidden_state
    if segments:
        _route_targets(base, batch, segments)
    starts = torch.tensor([0, *lengths[:-1]], device=states.device).cumsum(0)
    return states.flatten(0, 1)[pad_index(batch.targets, starts, states.shape[1], owner_rows(batch))]


def decode_packed(base: BaseModel, batch: Batch, encoded: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Run the decoder over encoded rows one after another, (T, D); return the states (N, D) that predict the labels."""
    assert batch.decoder is not None
    decoder = base.model.get_decoder()
    embedded = decoder.embed_tokens(batch.decoder.ids)
    states = biased.run_decoder(decoder, embedded, batch.decoder.lengths, encoded, lengths, batch.decoder_rows)
    return states[batch.targets]


def _route_targets(base: BaseModel, batch: Batch, segments: tuple[Segment, ...]) -> None:
    owners = batch.owners.tolist()
    parts = tuple(
        slice(sum(owner < segment.start for owner in owners), sum(owner < segment.stop for owner in owners))
        for segment in segments
    )
    base.grafts.use_segments(segments, parts, axis=0)
