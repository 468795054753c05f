"""Frozen blocks: what lies below the first thing a tuning touches gives the same states in every epoch, so it runs once.

    plain:    embed -> block 1 ... block b -> block b+1 ... block n -> norm          every step
    frozen:   states (T, D) of block b, read from disk -> block b+1 ... block n -> norm

For an encoder-decoder whose encoder is untouched the states are the encoder's output.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from luthier.models.base import BaseModel
from luthier.models.batch import Batch, Packed
from luthier.models.biased import run_encoder
from luthier.models.padding import pad
from luthier.models.run import decode_packed, decode_targets, embed, encode, run_rows

# Families whose decoder is embeddings, `layers` and `norm`, with nothing in between.
SLICED = {"llama", "mistral", "qwen2", "qwen3"}
_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


def frozen_blocks(base: BaseModel, name: str) -> int:
    """Blocks that run before anything the tuning `name` touches: of the decoder, or of an untouched encoder; 0 for none."""
    if name in base.grafts.prompts or (name in base.grafts.prefixes and not base.encoder_decoder):
        return 0
    touched = [*base.grafts.deltas(name), *base.grafts.substitutes.get(name, {})]
    if base.encoder_decoder:
        encoder = any(path.startswith(("encoder", "shared")) for path in touched)
        return 0 if encoder else base.blocks
    if base.family not in SLICED:
        return 0
    return min((_first_block(path, base.blocks) for path in touched), default=base.blocks)


def _first_block(path: str, blocks: int) -> int:
    if found := _BLOCK.search(path):
        return int(found[1])
    return 0 if "embed" in path else blocks  # the last norm and the head come after all blocks


@torch.no_grad()
def frozen_states(base: BaseModel, packed: Packed, blocks: int) -> Tensor:
    """The states of rows after the first `blocks` blocks (of an encoder-decoder: its encoder): (T, D)."""
    with base.grafts.bare():
        if base.packs_pairs():
            return run_encoder(base.model.get_encoder(), embed(base, packed, ())[0], packed.lengths)
        if base.encoder_decoder:
            encoded, mask = encode(base, packed, ())
            return encoded[mask.bool()]
        with only_blocks(base, 0, blocks, norm=False):
            return run_rows(base, base.embedding(packed.ids), packed)


def target_states_behind(base: BaseModel, batch: Batch) -> Tensor:
    """As `run.target_states`, of a batch that brings its states along."""
    assert batch.states is not None
    states = batch.states.to(base.dtype)
    if base.packs_pairs():
        return decode_packed(base, batch, states, batch.source.lengths)
    if base.encoder_decoder:
        return decode_targets(base, batch, *pad(states, batch.source.lengths))
    with only_blocks(base, batch.frozen, base.blocks, norm=True):
        return run_rows(base, states, batch.source)[batch.targets]


@contextmanager
def only_blocks(base: BaseModel, start: int, stop: int, norm: bool) -> Iterator[None]:
    """Within it the decoder is its blocks `start` to `stop`, with its last norm or without."""
    decoder = base.model.get_decoder()
    layers, last = decoder.layers, decoder.norm
    decoder.layers = layers[start:stop]
    if not norm:
        decoder.norm = nn.Identity()
    try:
        yield
    finally:
        decoder.layers, decoder.norm = layers, last
