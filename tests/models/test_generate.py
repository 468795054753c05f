"""Greedy decoding writes the tokens transformers' own generate writes, row by row."""

import random

import pytest
import torch
from tests import tiny

from luthier.encoding.batches import collate
from luthier.encoding.encoder import Encoded
from luthier.models.generate import generate
from luthier.tuning import IA3, Bottleneck, LoRA, PrefixTuning, PromptTuning, Selective, attach, parameters

FAMILIES = tiny.DECODERS + tiny.UNPACKED + tiny.ENCODER_DECODERS


def prompts_for(top: int, count: int = 7) -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randint(3, top - 1) for _ in range(draw.randint(2, 25))] for _ in range(count)]


def own(plain, prompt: list[int], new_tokens: int, stop: int) -> list[int]:
    if not plain.encoder_decoder:
        plain.model.set_attn_implementation("eager")
    out = plain.model.generate(
        torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=stop
    )[0].tolist()
    out = out[1:] if plain.encoder_decoder else out[len(prompt) :]
    return out[: out.index(stop)] if stop in out else out


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_greedy_equals_transformers_generate(family: str) -> None:
    base, plain = tiny.make(family), tiny.make(family)
    prompts = prompts_for(base.embedding.weight.shape[0])
    free = own(plain, prompts[0], 12, 2)
    stop = free[len(free) // 2] if free else 2  # a token that does occur, so that rows end early
    expected = [own(plain, prompt, 12, stop) for prompt in prompts]
    finished: list[int] = []
    found = generate(base, prompts, 12, [stop], batch_rows=3, on_finished=lambda i, _: finished.append(i))
    assert found == expected
    assert sorted(finished) == list(range(len(prompts)))
    assert {len(row) for row in found} != {12}


def slow(base, prompt: list[int], new_tokens: int, stop: int) -> list[int]:
    """Greedy decoding that is its meaning: the whole row again for every token."""
    written: list[int] = []
    for _ in range(new_tokens):
        row = Encoded("row", prompt, [*written, 0])  # the label is not used
        with torch.no_grad():
            states = base.target_states(collate([row], base.decoder_start if base.encoder_decoder else None))
            token = int(base.logits(states[-1:]).argmax())
        if token == stop:
            break
        written.append(token)
    return written


TUNINGS = {
    "lora": LoRA(rank=2, targets=["all-linear", "embeddings", "lm_head"]),
    "ia3": IA3(),
    "prompt": PromptTuning(length=3, init="random"),
    "prefix": PrefixTuning(length=5, init="random"),
    "bottleneck": Bottleneck(reduction=4),
    "selective": Selective(targets="last-1-block"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tuned_generation_is_slow_generation_row_by_row(family: str) -> None:
    base = tiny.make(family)
    prompts = prompts_for(base.embedding.weight.shape[0], 4)
    bare = generate(base, prompts, 8, [2])
    for name, method in TUNINGS.items():
        attach(base, name, method, seed=1)
        with torch.no_grad():
            for parameter in parameters(base, name).values():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        base.use(name)
        together = generate(base, prompts, 8, [2], batch_rows=3)
        assert together == [slow(base, prompt, 8, 2) for prompt in prompts], name
        assert together != bare, "the tuning has no effect"
    base.use(None)
    assert generate(base, prompts, 8, [2]) == bare
