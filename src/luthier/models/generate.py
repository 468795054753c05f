"""Batched decoding: rows sorted by length, what they begin with alike computed once, finished rows leave the batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput

from luthier.models.base import BaseModel
from luthier.models.batch import Packed, common_start
from luthier.models.beams import Beams
from luthier.models.decoding import Chooser, Decoding
from luthier.models.grafted import standing_still
from luthier.models.packing import Packing, RowCache
from luthier.models.padding import pad_left
from luthier.models.run import behind, embed, encode, run_packed

# Rows decoded together; on an accelerator, which so few do not fill, more of them while they hold no more than these tokens.
BATCH_ROWS, MOST_ROWS, ACCELERATOR_TOKENS = 32, 128, 32_768

GREEDY = Decoding()
NO_TOKEN = 2**31 - 1  # for an empty list transformers would put its own default


def batches_by_length(
    prompts: Sequence[Sequence[int]], batch_size: int | None = None, device: str = "cpu"
) -> list[list[int]]:
    """Which prompts are decoded together, `batch_size` or what suits the device: neighbours in length, the longest first."""
    batches: list[list[int]] = []
    room = 0
    for place in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        if not room:
            batches.append([])
            fits = 0 if device == "cpu" else ACCELERATOR_TOKENS // max(1, len(prompts[place]))
            room = batch_size or max(BATCH_ROWS, min(MOST_ROWS, fits))
        batches[-1].append(place)
        room -= 1
    return batches


@torch.no_grad()
def generate(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[int],
    on_finished: Callable[[int, list[int]], None] | None = None,
    decoding: Decoding = GREEDY,
    places: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue each prompt with the active tuning until a stop token or `max_new_tokens`.

    Returns the new token ids of each prompt, in the order given, without the stop token; with none in `stop`, as many as asked.
    `on_finished(i, ids)` is called as soon as prompt i is done, and changes no weights. `places` are the prompts' numbers,
    from which their draws follow; by default 0, 1, 2 ...
    """
    numbers = range(len(prompts)) if places is None else places
    results: list[list[int]] = [[] for _ in prompts]
    with standing_still():
        if not base.sharded:  # divided weights are whole in their blocks' passes alone
            base.grafts.derive(base.dtype)
        for rows in batches_by_length(prompts, decoding.batch_size, base.device.type):
            chunk = [list(prompts[i]) for i in rows]
            decode = _decode_padded
            if base.packs:
                decode = _decode_beams if decoding.beams > 1 else _decode_packed
            elif base.encoder_decoder and decoding.beams == 1 and not base.grafts.prefixes_of(range(1), ()):
                decode = _decode_encoded
            for place, ids in decode(base, chunk, max_new_tokens, set(stop), decoding, [numbers[i] for i in rows]):
                results[rows[place]] = ids
                if on_finished:
                    on_finished(rows[place], ids)
    return results


def _decode_packed(
    base: BaseModel, prompts: list[list[int]], new_tokens: int, stop: set[int], decoding: Decoding, numbers: list[int]
) -> Iterator[tuple[int, list[int]]]:
    """One token a row and step."""
    states, cache = prefill(base, prompts, new_tokens)
    choose = Chooser(decoding, numbers)
    alive = list(range(len(prompts)))
    written: list[list[int]] = [[] for _ in prompts]
    for step in range(new_tokens):
        tokens = choose(base.logits(states), alive)  # (rows,)
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
            keep = _with_few_moved(keep)
            cache.keep(keep)
            tokens, alive = tokens[torch.tensor(keep, device=base.device)], [alive[place] for place in keep]
        states = decode_step(base, cache, tokens)
    for row in alive:
        yield row, written[row]


def _with_few_moved(keep: list[int]) -> list[int]:
    """The rows that go on, in an order in which most stay where they are: the last ones take the places of those that left."""
    stay = {place for place in keep if place < len(keep)}
    last = iter([place for place in keep if place >= len(keep)])
    return [place if place in stay else next(last) for place in range(len(keep))]


def _decode_encoded(
    base: BaseModel, prompts: list[list[int]], new_tokens: int, stop: set[int], decoding: Decoding, numbers: list[int]
) -> Iterator[tuple[int, list[int]]]:
    """One token a row and step of an encoder-decoder: all rows stand at the same place, so only finished ones make a difference."""
    packed = Packed(
        torch.tensor([token for row in prompts for token in row], device=base.device), tuple(map(len, prompts))
    )
    encoded, mask = encode(base, packed, ())
    cache = EncoderDecoderCache(DynamicCache(config=base.config), DynamicCache(config=base.config))
    choose = Chooser(decoding, numbers)
    alive = list(range(len(prompts)))
    written: list[list[int]] = [[] for _ in prompts]
    tokens = torch.full((len(prompts),), base.decoder_start, device=base.device)
    for _ in range(new_tokens):
        states = base.model.get_decoder()(
            input_ids=tokens[:, None], encoder_hidden_states=encoded, encoder_attention_mask=mask,
            past_key_values=cache, use_cache=True,
        ).last_hidden_state[:, -1]  # fmt: skip
        tokens = choose(base.logits(states), alive)
        keep = [place for place, token in enumerate(tokens.tolist()) if token not in stop]
        for row, token in zip(alive, tokens.tolist(), strict=True):
            if token in stop:
                yield row, written[row]
            else:
                written[row].append(token)
        if not keep:
            return
        if len(keep) < len(alive):
            rows = torch.tensor(keep, device=base.device)
            cache.batch_select_indices(rows)
            encoded, mask, tokens = encoded[rows], mask[rows], tokens[rows]
            alive = [alive[place] for place in keep]
    for row in alive:
        yield row, written[row]


def _decode_beams(
    base: BaseModel, prompts: list[list[int]], new_tokens: int, stop: set[int], decoding: Decoding, numbers: list[int]
) -> Iterator[tuple[int, list[int]]]:
    """One token a partial answer and step; the partial answers of a row stand together in the batch."""
    states, cache = prefill(base, prompts, new_tokens, decoding.beams)
    searches = {row: Beams(decoding, stop, new_tokens) for row in range(len(prompts))}
    while searches:
        logits, start = base.logits(states), 0
        kept: list[int] = []
        tokens: list[int] = []
        for row, beams in list(searches.items()):
            width = len(beams.written)
            parents = beams.extend(logits[start : start + width])
            if parents:
                kept += [start + parent for parent in parents]
                tokens += [ids[-1] for ids in beams.written]
            else:
                yield row, beams.best()
                del searches[row]
            start += width
        if searches:
            cache.keep(kept)
            states = decode_step(base, cache, torch.tensor(tokens, device=base.device))


def prefill(base: BaseModel, prompts: list[list[int]], new_tokens: int, beams: int = 1) -> tuple[Tensor, RowCache]:
    """Run all prompts as one packed row: the last state of each (rows, D), and what they leave to attend to, with room for
    `beams` continuations of each.

    What all of them begin with (shots, a system prompt) runs once, they fork from it, and its keys and values are kept once.
    """
    device, alike = base.device, common_start(prompts, min(map(len, prompts)) - 1)
    own = [row[alike:] for row in prompts]
    flat = torch.tensor([*prompts[0][:alike], *(token for row in own for token in row)], device=device)
    lengths = tuple(map(len, own))
    packed = Packed(flat, (len(flat),), (lengths,)) if alike else Packed(flat, lengths)
    embedded, grown, _ = embed(base, packed, ())
    if alike:  # a soft prompt stands before it
        alike += grown[0] - len(flat)
    else:
        lengths = grown
    prefixes = base.grafts.prefixes_of(range(len(grown)), ())
    cache = RowCache(base.blocks, lengths, new_tokens, alike, prefixes, beams)
    positions = replace(packed, lengths=grown).positions(prefixes.lengths if prefixes else ())
    packing = Packing(grown, packed.branches, cache=cache, prefixes=prefixes)
    states = run_packed(base, embedded[None], torch.tensor(positions, device=device)[None], packing)[0]
    cache.prompts_are_in(device)
    return states[torch.tensor(lengths, device=device).cumsum(0) + (alike - 1)], cache


def decode_step(base: BaseModel, cache: RowCache, tokens: Tensor) -> Tensor:
    """Run one new token a row; (rows, D)."""
    assert cache.filled is not None
    packing = Packing((), cache=cache)
    states = run_packed(base, base.embedding(tokens)[:, None], cache.filled[:, None], packing)[:, 0]
    cache.advance()
    return states


class _Drawn(LogitsProcessor):
    """Leaves transformers' greedy choice nothing but the token that was drawn."""

    def __init__(self, choose: Chooser):
        self.choose = choose

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = self.choose(scores, range(len(scores)))
        return torch.full_like(scores, float("-inf")).scatter(1, tokens[:, None], 0.0)


def _own_generate(base: BaseModel, **options: Any) -> Tensor:
    """transformers' `generate`, told everything here: what the model's generation_config asks for (a least length, no
    repetitions) would otherwise be obeyed unseen.
    """
    asked = base.model.generation_config
    start = base.decoder_start if base.encoder_decoder else None
    base.model.generation_config = GenerationConfig(decoder_start_token_id=start)
    try:
        found: Tensor = base.model.generate(**options)
        return found
    finally:
        base.model.generation_config = asked


def _decode_padded(
    base: BaseModel, prompts: list[list[int]], new_tokens: int, stop: set[int], decoding: Decoding, numbers: list[int]
) -> Iterator[tuple[int, list[int]]]:
    """Decode through transformers' own generate: families that do not pack, and encoder-decoders with beams or prefixes."""
    packed = Packed(
        torch.tensor([token for row in prompts for token in row], device=base.device), tuple(map(len, prompts))
    )
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "num_beams": decoding.beams,
        "eos_token_id": sorted(stop) or [NO_TOKEN],
        "pad_token_id": min(stop, default=0),
    }
    if decoding.beams > 1:
        options["length_penalty"] = decoding.length_penalty
    if decoding.temperature:
        options["logits_processor"] = LogitsProcessorList([_Drawn(Chooser(decoding, numbers))])
    prefixes = base.grafts.prefixes_of(range(len(prompts)), ())
    if base.encoder_decoder:
        encoded, mask = encode(base, packed, ())
        if prefixes:
            before = behind(base, prefixes, mask.new_ones(len(prompts), 1))
            options |= {
                "past_key_values": before["past_key_values"],
                "decoder_attention_mask": before["attention_mask"],
            }
        out = _own_generate(
            base, encoder_outputs=BaseModelOutput(last_hidden_state=encoded), attention_mask=mask, **options
        )[:, 1:]  # without the decoder's start token
    else:
        embedded, lengths, _ = embed(base, packed, ())
        padded, mask = pad_left(embedded, lengths)
        if prefixes:
            before = behind(base, prefixes, mask)
            options["past_key_values"], mask = before["past_key_values"], before["attention_mask"]
            # `generate` takes the embeddings of all that the mask covers and skips what the cache holds.
            padded = torch.cat([padded.new_zeros(len(prompts), max(prefixes.lengths), padded.shape[2]), padded], dim=1)
        out = _own_generate(base, inputs_embeds=padded, attention_mask=mask, **options)
    for row, ids in enumerate(out.tolist()):
        end = next((place for place, token in enumerate(ids) if token in stop), len(ids))
        yield row, ids[:end]
