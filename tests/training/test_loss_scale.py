"""float16: small gradients survive, an overflow costs a step's work and nothing else, a resumed run ends in the same bits."""

import math
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.training.test_choices import rows_for

from luthier.encoding.order import Shuffled
from luthier.models.base import BaseModel
from luthier.training import loop, loss_scale
from luthier.training.loop import accumulate, train
from luthier.training.settings import TrainingSettings
from luthier.tuning import Full, LoRA, Method, attach, parameters


def tuned(method: Method, dtype: torch.dtype = torch.float16) -> BaseModel:
    base = tiny.make("llama", dtype)
    attach(base, "t", method, seed=1)
    base.use("t")
    return base


def gradients(base: BaseModel, scale: float) -> torch.Tensor:
    accumulate(base, rows_for(base)[:8], 10_000, loss_scale=scale)
    return torch.cat([one.grad.double().flatten() / scale for one in parameters(base, "t").values()])


def test_scaled_gradients_are_nearer_to_those_of_float32() -> None:
    exact = gradients(tuned(Full(), torch.float32), 1.0)
    small = 2.0**-14  # as if there were so many more targets
    unscaled, scaled = (gradients(tuned(Full()), small * factor) for factor in (1.0, loss_scale.START))
    lost = lambda found: float((found - exact).norm() / exact.norm())  # noqa: E731
    assert lost(scaled) < 0.02 < lost(unscaled)


@pytest.mark.parametrize("method", [LoRA(rank=2), Full()], ids=["lora", "full"])
def test_an_overflow_is_repeated_with_half_the_scale(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "first_scale", lambda dtype: 2.0**40)
    base = tuned(method)
    settings = TrainingSettings(max_steps=6, batch_size=4, learning_rate=1e-3)
    progress = train(base, "t", Shuffled(rows_for(base), 0), settings, 0, tmp_path)
    halved = [event["loss_scale"] for event in progress.history if "loss_scale" in event]
    assert halved and halved == [2.0 ** (39 - place) for place in range(len(halved))]
    assert progress.step == 6 and progress.loss_scale == halved[-1]
    assert all(math.isfinite(event["loss"]) for event in progress.history if "loss" in event)
    assert all(one.isfinite().all() for one in parameters(base, "t").values())


def test_the_scale_grows_after_good_steps_and_is_kept_over_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "GROW_AFTER", 2)
    whole, part = tuned(LoRA(rank=2)), tuned(LoRA(rank=2))
    settings = TrainingSettings(max_steps=5, batch_size=4, learning_rate=1e-3)
    steps: list[int] = []
    once = train(whole, "t", Shuffled(rows_for(whole), 0), settings, 0, tmp_path / "whole")
    assert once.loss_scale == loss_scale.START * 4
    with pytest.raises(loop.Interrupted):
        train(part, "t", Shuffled(rows_for(part), 0), settings, 0, tmp_path / "part", should_stop=lambda: len(steps) == 3, hooks=[lambda event: steps.append(event["step"])])  # fmt: skip
    again = tuned(LoRA(rank=2))
    twice = train(again, "t", Shuffled(rows_for(again), 0), settings, 0, tmp_path / "part")
    assert (twice.loss_scale, twice.good_steps) == (once.loss_scale, once.good_steps)
    assert all(
        torch.equal(a, b) for a, b in zip(parameters(whole, "t").values(), parameters(again, "t").values(), strict=True)
    )


def test_other_precisions_are_not_scaled() -> None:
    assert loss_scale.first_scale(torch.bfloat16) == loss_scale.first_scale(torch.float32) == 1.0
    assert loss_scale.grown(1.0, loss_scale.GROW_AFTER) == 1.0
