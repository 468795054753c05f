"""A linear and what is grafted on it as one product, against the same by autograd."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.models.grafted import Delta
from luthier.models.products import apply_alone
from luthier.tuning.bottleneck import ACTIVATIONS, Adapter
from luthier.tuning.ia3 import ScaledInput, ScaledOutput
from luthier.tuning.low_rank import LowRank

INPUTS, OUTPUTS = 10, 6
DRAW = torch.Generator()
DELTAS = {
    "low rank": lambda: LowRank((INPUTS, OUTPUTS), 3, 0.5, 0.0, DRAW),
    "scaled output": lambda: ScaledOutput(OUTPUTS),
    "scaled input": lambda: ScaledInput(INPUTS),
    **{f"behind, {one}": lambda one=one: Adapter(OUTPUTS, 4, one, False, DRAW) for one in ACTIVATIONS},
}


@pytest.mark.parametrize("name", DELTAS)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_output_and_gradients_are_autograds(name: str, turned: bool, wanted: bool) -> None:
    torch.manual_seed(0)
    DRAW.manual_seed(1)
    linear = (Conv1D(OUTPUTS, INPUTS) if turned else nn.Linear(INPUTS, OUTPUTS)).double().requires_grad_(False)
    delta: Delta = DELTAS[name]().double()
    with torch.no_grad():
        for one in delta.parameters():
            one.add_(torch.randn_like(one))
    x = torch.randn(2, 7, INPUTS, dtype=torch.float64, requires_grad=wanted)
    upstream = torch.randn(2, 7, OUTPUTS, dtype=torch.float64)
    asked = [*delta.parameters(), *([x] if wanted else [])]
    product = delta.as_product(linear)
    assert product is not None
    found = apply_alone(product, x)
    expected = delta(x, linear(delta.enter(x)))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    gradients = [torch.autograd.grad(out, asked, upstream) for out in (found, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)  # sums of factors' gradients are in fp32
