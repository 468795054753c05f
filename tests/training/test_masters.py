"""fp32 masters of 16-bit weights: they round to the weights they start from, and weights follow small updates on average."""

import pytest
import torch
from tests import tiny
from tests.training.test_loop import rows_for
from torch.nn import Parameter

from luthier.errors import UserError
from luthier.training.loop import accumulate
from luthier.training.optimizer import Optimizer, scattered
from luthier.tuning import Full, attach
from luthier.tuning.method import parameters

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@HALVES
def test_masters_round_to_the_weights_from_all_over_their_cells(dtype: torch.dtype) -> None:
    tail = torch.tensor([0.0, -0.0, 1.0, -2.0, 6e-8, 65504.0, torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny])
    weight = torch.cat([torch.randn(100_000) * 0.2, tail]).to(dtype)
    masters = scattered(weight, "a")
    assert torch.equal(masters.to(dtype), weight)
    assert torch.equal(masters, scattered(weight, "a")) and not torch.equal(masters, scattered(weight, "b"))
    ones = scattered(torch.full((100_000,), 1.5, dtype=dtype), "a")  # no power of two: its cell is even on both sides
    half = float(torch.finfo(dtype).eps) / 2
    assert 0.99 * half < 1.5 - float(ones.min()) < half and 0.99 * half < float(ones.max()) - 1.5 < half
    assert abs(float(ones.double().mean()) - 1.5) < half / 100


@HALVES
def test_weights_move_on_average_as_their_masters(dtype: torch.dtype) -> None:
    """By a tenth of the weights' spacing: rounded from the middle of their cells, none would move."""
    weight = Parameter(torch.full((200_000,), 1.5, dtype=dtype))
    optimizer = Optimizer({"w": weight}, 0.0)
    weight.grad = torch.ones_like(weight)
    step = float(torch.finfo(dtype).eps) / 10
    optimizer.step(step, clip=1e9)  # AdamW's first step is the rate itself
    moved = 1.5 - float(weight.detach().double().mean())
    assert moved == pytest.approx(step, rel=0.05)


def test_training_all_weights_in_bf16_follows_float32() -> None:
    """Six steps far below the spacing of most weights lower the loss as much as in float32."""
    lowered = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny.make("llama", dtype)
        with torch.no_grad():
            for one in base.model.parameters():
                one.mul_(4)  # weights of some size, as of a trained model
        attach(base, "t", Full())
        base.use("t")
        rows, owned = rows_for(base), parameters(base, "t")
        optimizer = Optimizer(owned, 0.0)
        losses = []
        for _ in range(7):
            loss, _ = accumulate(base, rows, 10_000)
            losses.append(loss)
            optimizer.step(1e-4, 1.0)
        lowered[dtype] = losses[0] - losses[-1]
    assert lowered[torch.float32] > 0
    assert lowered[torch.bfloat16] == pytest.approx(lowered[torch.float32], rel=0.25)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adamw_is_torchs_on_the_masters(dtype: torch.dtype, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With decay of matrices alone, a rate of its own and clipping; a parameter without gradient stays."""
    if not kernels:
        monkeypatch.setattr("luthier.models.kernels.calls.library", lambda: "switched off")
    draw = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (37, 19), "a.bias": (301,), "b.weight": (300, 90), "still.weight": (4, 4)}
    owned = {key: Parameter(torch.randn(shape, generator=draw).to(tiny.DEVICE, dtype)) for key, shape in shapes.items()}
    still = owned["still.weight"].detach().clone()
    optimizer = Optimizer(owned, 0.1, factors={"b.weight": 4.0})
    twins = {key: Parameter(master.detach().clone()) for key, master in optimizer.masters.items()}
    plain = torch.optim.AdamW(
        [
            {"params": [one], "weight_decay": 0.1 if one.ndim > 1 else 0.0, "factor": 4.0 if key == "b.weight" else 1.0}
            for key, one in twins.items()
        ]
    )
    for step in range(5):
        gradients = {key: torch.randn(shape, generator=draw).to(tiny.DEVICE, dtype) for key, shape in shapes.items()}
        del gradients["still.weight"]
        for key, gradient in gradients.items():
            owned[key].grad, twins[key].grad = gradient.clone(), gradient.float()
        norm = torch.nn.utils.clip_grad_norm_(twins.values(), 20.0)
        for group in plain.param_groups:
            group["lr"] = 0.01 * (step + 1) * group["factor"]
        plain.step()
        assert optimizer.step(0.01 * (step + 1), 20.0) == pytest.approx(float(norm), rel=1e-5)
        assert all(one.grad is None for one in owned.values())
        for key, twin in twins.items():
            torch.testing.assert_close(optimizer.masters[key].detach(), twin.detach(), rtol=1e-5, atol=1e-6)
            assert torch.equal(owned[key], optimizer.masters[key].to(dtype)), key
    assert torch.equal(owned["still.weight"], still)
    state = optimizer.state()
    for key, twin in twins.items():
        for part, expected in plain.state[twin].items():
            torch.testing.assert_close(state[f"{part}/{key}"].cpu(), expected.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.bfloat16)])
def test_a_moment_of_another_shape_is_refused(wrong: torch.Tensor) -> None:
    optimizer = Optimizer({"w": Parameter(torch.ones(2, 3, dtype=torch.bfloat16))}, 0.0)
    with pytest.raises(UserError, match="exp_avg/w is .* it is damaged"):
        optimizer.restore({"exp_avg/w": wrong})
