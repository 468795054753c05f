"""A prefix is what the base computed on its text; it is read behind nothing and in front of everything."""

from dataclasses import replace

import pytest
import torch
from tests import tiny

from luthier.encoding.batches import collate, collate_choices
from luthier.encoding.encoder import Encoded
from luthier.errors import UserError
from luthier.models.loss import label_scores
from luthier.models.observe import keys_and_values
from luthier.tuning import LoRA, PrefixTuning, attach, parameters

TEXT = "the guest asks for a quiet room"


def scores(base, rows: list[Encoded]) -> torch.Tensor:
    return label_scores(base, collate(rows, base.decoder_start if base.encoder_decoder else None))[0]


@pytest.mark.parametrize("network", [False, True], ids=["plain", "network"])
@pytest.mark.parametrize("family", tiny.DECODERS + tiny.UNPACKED)
def test_a_fresh_prefix_acts_as_its_text_in_the_prompt(family: str, network: bool) -> None:
    base = tiny.make(family)
    ids = base.tokenizer(TEXT).input_ids
    rows = [Encoded("a", [5, 6, 7, 8], [9, 10]), Encoded("b", [11, 12], [13])]
    in_prompt = scores(base, [replace(row, prompt=[*ids, *row.prompt]) for row in rows])
    attach(base, "t", PrefixTuning(length=len(ids), init_text=TEXT, reparametrise=network, hidden=4))
    base.use("t")
    torch.testing.assert_close(scores(base, rows), in_prompt, atol=2e-5, rtol=1e-5)


def test_a_prefix_is_drawn_from_the_bare_base() -> None:
    base = tiny.make("llama")
    expected = keys_and_values(base, [5, 6, 7])
    attach(base, "lora", LoRA(rank=2))
    with torch.no_grad():
        for parameter in parameters(base, "lora").values():
            parameter.normal_()
    base.use("lora")
    before = scores(base, [Encoded("a", [5, 6], [7])])
    assert torch.equal(keys_and_values(base, [5, 6, 7]), expected)
    assert torch.equal(scores(base, [Encoded("a", [5, 6], [7])]), before), "what was in use is in use again"


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "t5"])
def test_choices_that_share_a_prompt_score_as_if_alone_behind_a_prefix(family: str) -> None:
    base = tiny.make(family)
    attach(base, "t", PrefixTuning(length=6, init="random"))
    base.use("t")
    start = base.decoder_start if base.encoder_decoder else None
    choices = [[5, 6, 7], [8], [9, 10]]
    batch, _ = collate_choices([("a", [20, 21, 22, 23], choices)], start)
    found = label_scores(base, batch)[0].split([3, 1, 2])
    for choice, one in zip(choices, found, strict=True):
        torch.testing.assert_close(one, scores(base, [Encoded("x", [20, 21, 22, 23], choice)]), atol=1e-5, rtol=1e-5)


def test_layers_of_an_encoder_decoder_share_pairs_as_in_peft() -> None:
    base = tiny.make("t5", blocks=4)
    attach(base, "t", PrefixTuning(length=2, init="random"))
    states = base.grafts.prefixes["t"]()
    assert torch.equal(states[0], states[2]) and torch.equal(states[1], states[3])
    assert not torch.equal(states[0], states[1])
    saved = base.methods["t"].to_file(base, "t")["prompt_embeddings"].view(2, 4, 2, -1)
    assert torch.equal(saved[:, 0], states[0].permute(2, 0, 1, 3).flatten(2))  # pair 0 is read by layers 0 and 2
    assert torch.equal(saved[:, 2], states[1].permute(2, 0, 1, 3).flatten(2))  # pair 2 by layers 1 and 3
    assert not saved[:, 1].any() and not saved[:, 3].any()


def test_a_prefix_longer_than_the_context_is_refused() -> None:
    with pytest.raises(UserError, match="512 virtual tokens do not fit a context of 512"):
        attach(tiny.make("llama"), "t", PrefixTuning(length=512))
    with pytest.raises(ValueError, match="hidden is 0"):
        PrefixTuning(hidden=0)
    with pytest.raises(UserError, match="has no tokens to start from"):
        attach(tiny.make("llama"), "t", PrefixTuning(init_text=""))
