"""Gradients made before the passes: small ones, the same numbers, and none for whom no pass met."""

import pytest
import torch
from tests import tiny
from tests.models.test_parity import rows_for
from torch.nn import Parameter

from luthier.training import gradients, loop
from luthier.training.gradients import SMALL, made_early
from luthier.training.loop import Progress, _gradients
from luthier.training.settings import TrainingSettings
from luthier.tuning import LoRA, attach
from luthier.tuning.method import parameters


def test_small_ones_are_there_and_add_up_and_who_was_not_met_has_none() -> None:
    met, unmet, frozen = (
        Parameter(torch.ones(3)),
        Parameter(torch.ones(3)),
        Parameter(torch.ones(3), requires_grad=False),
    )
    large, given = Parameter(torch.ones(SMALL // 4 + 1)), Parameter(torch.ones(3))
    given.grad = torch.full((3,), 5.0)
    places = []
    with made_early([met, unmet, frozen, large, given]):
        places.append(met.grad.data_ptr())
        assert large.grad is None and frozen.grad is None and torch.equal(given.grad, torch.full((3,), 5.0))
        for _ in range(2):
            (2 * met.sum() + large.sum() + given.sum()).backward()
        places.append(met.grad.data_ptr())
    assert places[0] == places[1]
    assert torch.equal(met.grad, torch.full((3,), 4.0)) and torch.equal(given.grad, torch.full((3,), 7.0))
    assert unmet.grad is None and frozen.grad is None and torch.equal(large.grad, torch.full_like(large, 2))


def test_a_zero_gradient_that_a_pass_gave_stays() -> None:
    met = Parameter(torch.ones(3))
    with made_early([met]):
        (met * 0).sum().backward()
    assert torch.equal(met.grad, torch.zeros(3))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_step_has_the_same_gradients_with_them_and_without(family: str, monkeypatch) -> None:
    base = tiny.make(family)
    attach(base, "t", LoRA(rank=4), 0)
    base.use("t")
    owned, settings = parameters(base, "t"), TrainingSettings(micro_batch_tokens=32)
    found, told = [], []

    def seen(given):
        told.append(list(given))
        return made_early(told[-1])

    monkeypatch.setattr(loop, "made_early", seen)
    for small in (SMALL, 0):
        monkeypatch.setattr(gradients, "SMALL", small)
        progress = Progress(micro_batch_tokens=32)
        loss = _gradients(base, "t", rows_for(base), settings, progress, print)
        found.append((loss, {key: one.grad for key, one in owned.items()}))
        for one in owned.values():
            one.grad = None
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, found[1][1][key]) for key, one in found[0][1].items())
    assert [{id(one) for one in given} for given in told] == [{id(one) for one in owned.values()}] * 2


def test_a_pass_that_fails_leaves_no_gradient_of_who_was_not_met() -> None:
    unmet = Parameter(torch.ones(3))
    with pytest.raises(RuntimeError), made_early([unmet]):
        raise RuntimeError
    assert unmet.grad is None
