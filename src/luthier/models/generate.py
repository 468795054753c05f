"""Batched greedy decoding: rows sorted by length, finished rows leave the batch."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from luthier.models.attention import Packing, RowCache
from luthier.models.base import BaseModel
from luthier.models.batch import Packed, Segment
from luthier.models.padding import pad_left


@torch.no_grad()
def generate(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[int],
    batch_rows: int = 32,
    on_finished: Callable[[int, list[int]], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt greedily with the active tuning until a stop token or `max_new_tokens`.

    Returns the new token ids of each prompt, in the order given, without the stop token.
    `on_finished(i, ids)` is called as soon as prompt i is done.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    results: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_rows):
        rows = order[start : start + batch_rows]
        chunk = [list(prompts[i]) for i in rows]
        decode = _decode_packed if base.packs else _decode_padded
        for place, ids in decode(base, chunk, max_new_tokens, set(stop)):
            results[rows[place]] = ids
            if on_finished:
                on_finished(rows[place], ids)
    return results


def _decode_packed(
    base: BaseModel, prompts: list[list[int]], new_tokens: int, stop: set[int]
) -> Iterator[tuple[int, list[int]]]:
    """Prefill all prompts as one packed row, then one token a row and step."""
    device = base.device
    packed = Packed(torch.tensor([token for row in prompts for token in row], device=device), tuple(map(len, prompts)))
    segments: tuple[Segment, ...] = ()
    embedded, lengths, _ = base.embed(packed, segments)
    prefixes = base.grafts.prefixes_of(range(len(prompts)), segments)
    cache = RowCache(lengths, new_tokens, prefixes)
    starts = prefixes.lengths if prefixes else ()
    positions = torch.tensor(Packed(packed.ids, lengths).positions(starts), device=device)
    packing = Packing(lengths, cache=cache, prefixes=prefixes)
    states = base.run_packed(embedded[None], positions[None], packing)[0]
    states = states[torch.tensor(lengths, device=device).cumsum(0) - 1]  # (rows, D), each row's last
    cache.prompts_are_in(device)
    alive = list(range(len(prompts)))
    written: list[list[int]] = [[] for _ in prompts]
    for step in range(new_tokens):
        tokens = base.logits(states).argmax(-1)  # (rows,)
        keep = []
        for place, (row, token) in enumerate(zip(alive, tokens.tolist(), strict=True)):
            if token in stop:
                yield row, written[row]
                continue
            written[row].append(token)
            keep.append(place)
        if step == new_tokens - 1 or not keep:
            alive = [alive[place] for place in keep]
            break
        if len(keep) < len(alive):
            rows = torch.tensor(keep, device=device)
            cache.keep(rows)
            tokens, alive = tokens[rows], [alive[place] for place in keep]
        assert cache.filled is not None
        packing = Packing((), cache=cache)
        states = base.run_packed(base.embedding(tokens)[:, None], cache.filled[:, None], packing)[:, 0]
        cache.advance()
    for row in alive:
        yield row, written[row]


def _decode_padded(
    base: BaseModel, prompts: list[list[int]], new_tokens: int, stop: set[int]
) -> Iterator[tuple[int, list[int]]]:
    """Decode through transformers' own generate: encoder-decoders, and families that do not pack."""
    packed = Packed(
        torch.tensor([token for row in prompts for token in row], device=base.device), tuple(map(len, prompts))
    )
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "eos_token_id": sorted(stop),
        "pad_token_id": sorted(stop)[0],
    }
    prefixes = base.grafts.prefixes_of(range(len(prompts)), ())
    if base.encoder_decoder:
        encoded, mask = base.encode(packed, ())
        if prefixes:
            before = base.behind(prefixes, mask.new_ones(len(prompts), 1))
            options |= {
                "past_key_values": before["past_key_values"],
                "decoder_attention_mask": before["attention_mask"],
            }
        out = base.model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded), attention_mask=mask, **options
        )[:, 1:]  # without the decoder's start token
    else:
        embedded, lengths, _ = base.embed(packed, ())
        padded, mask = pad_left(embedded, lengths)
        if prefixes:
            before = base.behind(prefixes, mask)
            options["past_key_values"], mask = before["past_key_values"], before["attention_mask"]
            # `generate` takes the embeddings of all that the mask covers and skips what the cache holds.
            padded = torch.cat([padded.new_zeros(len(prompts), max(prefixes.lengths), padded.shape[2]), padded], dim=1)
        out = base.model.generate(inputs_embeds=padded, attention_mask=mask, **options)
    for row, ids in enumerate(out.tolist()):
        end = next((place for place, token in enumerate(ids) if token in stop), len(ids))
        yield row, ids[:end]
