"""RMSNorm with its gradient written out, against transformers' own classes."""

import pytest
import torch
from tests import tiny
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from luthier.models.norms import rms_norm


@pytest.mark.parametrize("kind", [LlamaRMSNorm, T5LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_transformers_own(kind, dtype: torch.dtype) -> None:
    own = kind(48, eps=1e-5).to(dtype)
    with torch.no_grad():
        own.weight.add_(torch.randn(48) * 0.3)
    x = torch.randn(3, 7, 48).to(dtype).requires_grad_()
    upstream = torch.randn(3, 7, 48).to(dtype)
    found = rms_norm(x, own.weight, 1e-5)
    expected = own(x)
    if dtype == torch.bfloat16:
        assert torch.equal(found, expected), "rounded where transformers rounds"
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(y, [x, own.weight], upstream) for y in (found, expected)]
    close = 1e-5 if dtype == torch.float32 else 0.06
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=close, rtol=close)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "t5"])
def test_a_base_runs_it_in_every_norm(family: str) -> None:
    from luthier.models.norms import _forward

    norms = [one for one in tiny.make(family).model.modules() if type(one).__name__.endswith(("RMSNorm", "LayerNorm"))]
    assert norms and all(one.forward.__func__ is _forward for one in norms)
