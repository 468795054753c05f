"""Greedy decoding writes the tokens transformers' own generate writes, row by row."""

import random

import pytest
import torch
from tests import tiny

from luthier.models.generate import generate
from luthier.tuning import LoRA, PromptTuning, attach, parameters

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


@pytest.mark.parametrize("family", ("llama", "gpt2", "t5"))
def test_tuned_generation_does_not_depend_on_the_batch(family: str) -> None:
    base = tiny.make(family)
    attach(base, "a", LoRA(rank=2), seed=1)
    attach(base, "b", PromptTuning(length=3, init="random"), seed=1)
    with torch.no_grad():
        for parameter in parameters(base, "a").values():
            parameter.normal_(std=0.3)
    prompts = prompts_for(base.embedding.weight.shape[0])
    bare = generate(base, prompts, 8, [2])
    for name in ("a", "b"):
        base.use(name)
        together = generate(base, prompts, 8, [2], batch_rows=7)
        assert together == [generate(base, [prompt], 8, [2])[0] for prompt in prompts]
        assert together != bare, "the tuning has no effect"
    base.use(None)
    assert generate(base, prompts, 8, [2]) == bare
