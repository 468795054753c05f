"""T5's attention against its formula, and a whole T5 against transformers' own."""

import pytest
import torch
from tests import tiny

from luthier.models.biased import NAME, biased_attention

SHAPES = {"encoder": (7, 7), "cross": (3, 7), "decoding": (1, 7)}


def formula(query, key, value, mask, scale, bias):
    scores = torch.einsum("rhld,rhsd->rhls", query, key) * scale + bias
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return torch.einsum("rhls,rhsd->rlhd", weights, value)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen bias", "trained bias"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_formula_and_so_is_its_gradient(shape: str, masked: bool, trained: bool) -> None:
    length, seen = SHAPES[shape]
    # As transformers lays them out: heads behind tokens in memory.
    inputs = [
        torch.randn(3, size, 2, 4, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for size in (length, seen, seen)
    ]
    bias = torch.randn(1, 2, length, seen, dtype=torch.float64, requires_grad=trained)
    hidden = torch.arange(seen) >= torch.tensor([7, 5, 2])[:, None]
    mask = torch.zeros(3, 1, 1, seen, dtype=torch.float64).masked_fill(hidden[:, None, None], -1e30) if masked else None
    wanted = [*inputs, bias] if trained else inputs
    for scale in (1.0, 0.3):
        found, _ = biased_attention(None, *inputs, mask, scaling=scale, position_bias=bias)
        expected = formula(*inputs, mask, scale, bias)
        torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)  # the softmax is in fp32
        upstream = torch.randn_like(expected)
        gradients = (torch.autograd.grad(out, wanted, upstream) for out in (found, expected))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["t5", "t5-gated"])
def test_a_whole_model_gives_what_transformers_gives(family: str) -> None:
    base = tiny.make(family)
    assert base.config._attn_implementation == NAME
    ids = torch.randint(3, 60, (3, 9), device=base.device)
    mask = (torch.arange(9, device=base.device) < torch.tensor([9, 6, 2], device=base.device)[:, None]).long()
    run = lambda: base.model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :5]).logits  # noqa: E731
    ours = run()
    base.model.set_attn_implementation("eager")
    torch.testing.assert_close(ours, run(), atol=1e-5, rtol=1e-5)
