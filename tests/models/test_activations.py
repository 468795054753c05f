"""GELU in one kernel against transformers' formula."""

import pytest
import torch
from tests import tiny
from transformers.activations import FastGELUActivation, NewGELUActivation

from luthier.models.activations import _forward


@pytest.mark.parametrize("kind", [NewGELUActivation, FastGELUActivation])
def test_value_and_gradient_are_the_formulas(kind) -> None:
    x = torch.linspace(-9, 9, 401, dtype=torch.float64, requires_grad=True)
    found, expected = _forward(None, x), kind()(x)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-7)  # FastGELU's constants have ten digits
    gradients = (torch.autograd.grad(y.sum(), x)[0] for y in (found, expected))
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("family", ["gpt2", "t5-gated"])
def test_a_base_runs_it(family: str) -> None:
    found = [one for one in tiny.make(family).model.modules() if isinstance(one, NewGELUActivation)]
    assert found and all(one.forward.__func__ is _forward for one in found)
