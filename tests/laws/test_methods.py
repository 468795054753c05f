"""The laws of the contract, for every trained method on every family, in fp32 and bf16.

identity at start; only owned parameters move; detach and swap restore the base's bits; save and load
restore bits; a row does not depend on its neighbours; micro-batches are one batch; counts follow the
formula.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from tests import tiny
from torch import Tensor

from luthier.encoding.batches import collate
from luthier.encoding.encoder import Encoded
from luthier.encoding.order import Shuffled
from luthier.models.base import BaseModel
from luthier.models.batch import Segment
from luthier.models.loss import label_scores
from luthier.training.loop import accumulate, train
from luthier.training.settings import TrainingSettings
from luthier.tuning import Full, LoRA, Method, PromptTuning, attach, detach, parameters
from luthier.tuning.files import load_tuning, pack

FAMILIES = tiny.DECODERS + tiny.UNPACKED + tiny.ENCODER_DECODERS
METHODS: dict[str, Method] = {
    "full": Full(),
    "lora": LoRA(rank=2, alpha=4),
    "prompt_tuning": PromptTuning(length=3, init="vocabulary"),
}
# Prompt tuning adds positions, so a fresh one changes the output by design.
IDENTITY_AT_START = {"full", "lora"}
DTYPES = [torch.float32, torch.bfloat16]

each_family = pytest.mark.parametrize("family", FAMILIES)
each_method = pytest.mark.parametrize("method", METHODS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


def make_rows(base: BaseModel, count: int = 6, seed: int = 0) -> list[Encoded]:
    draw = random.Random(seed)
    top = base.embedding.weight.shape[0] - 1
    tokens = lambda least, most: [draw.randint(3, top) for _ in range(draw.randint(least, most))]  # noqa: E731
    return [Encoded(f"row {number}", tokens(4, 16), tokens(2, 6)) for number in range(count)]


def batch_of(base: BaseModel, rows: list[Encoded]):
    return collate(rows, base.decoder_start if base.encoder_decoder else None)


def scores(base: BaseModel, rows: list[Encoded]) -> Tensor:
    return label_scores(base, batch_of(base, rows))[0]


def disturb(base: BaseModel, name: str) -> None:
    """Move a tuning away from its start, as training would."""
    with torch.no_grad():
        for parameter in parameters(base, name).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def bits(base: BaseModel) -> dict[str, Tensor]:
    return {key: parameter.detach().clone() for key, parameter in base.grafts.originals.items()}


@each_family
@each_method
@each_dtype
def test_a_fresh_tuning_is_the_base_and_detaching_restores_it(family: str, method: str, dtype: torch.dtype) -> None:
    base = tiny.make(family, dtype)
    rows = make_rows(base)
    before, tree = scores(base, rows), [path for path, _ in base.model.named_modules()]
    attach(base, "t", METHODS[method])
    assert torch.equal(scores(base, rows), before), "attaching must not change the bare base"
    base.use("t")
    if method in IDENTITY_AT_START:
        assert torch.equal(scores(base, rows), before)
    disturb(base, "t")
    assert not torch.equal(scores(base, rows), before), "the tuning has no effect"
    detach(base, "t")
    assert torch.equal(scores(base, rows), before)
    assert [path for path, _ in base.model.named_modules()] == tree


@each_family
@each_method
@each_dtype
def test_training_moves_what_is_owned_and_nothing_else(
    family: str, method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = tiny.make(family, dtype)
    before = bits(base)
    attach(base, "t", METHODS[method])
    attach(base, "bystander", LoRA(rank=1))
    idle = {key: parameter.detach().clone() for key, parameter in parameters(base, "bystander").items()}
    start = {key: parameter.detach().clone() for key, parameter in parameters(base, "t").items()}
    settings = TrainingSettings(max_steps=3, batch_size=4, learning_rate=1e-2, warmup=0.0)
    train(base, "t", Shuffled(make_rows(base), 0), settings, 0, tmp_path)
    for key, tensor in bits(base).items():
        assert torch.equal(tensor, before[key]), f"the base's {key} moved"
    for key, parameter in parameters(base, "bystander").items():
        assert torch.equal(parameter, idle[key]), f"another tuning's {key} moved"
    still = [key for key, parameter in parameters(base, "t").items() if torch.equal(parameter, start[key])]
    assert len(still) <= len(start) // 4, f"owned but never moved: {still}"


@each_family
@each_method
def test_swapping_is_bit_exact_however_often(family: str, method: str) -> None:
    base = tiny.make(family)
    rows = make_rows(base)
    before = scores(base, rows)
    for name, other in (("a", METHODS[method]), ("b", LoRA(rank=1)), ("c", Full()), ("d", PromptTuning(length=2))):
        attach(base, name, other, seed=len(name))
        disturb(base, name)
    expected: dict[str | None, Tensor] = {None: before}
    for name in "abcd":
        base.use(name)
        expected[name] = scores(base, rows)
    for name in [*"abcdacbd", None] * 3:
        base.use(name)
        assert torch.equal(scores(base, rows), expected[name])


@each_family
@each_method
@each_dtype
def test_save_and_load_restore_the_bits(family: str, method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny.make(family, dtype)
    rows = make_rows(base)
    attach(base, "t", METHODS[method], seed=5)
    disturb(base, "t")
    base.use("t")
    expected = scores(base, rows)
    for file, content in pack(base, "t").items():
        (tmp_path / file).write_bytes(content)
    fresh = tiny.make(family, dtype)
    load_tuning(fresh, tmp_path, "again")
    for key, parameter in parameters(fresh, "again").items():
        assert torch.equal(parameter, parameters(base, "t")[key])
    fresh.use("again")
    assert torch.equal(scores(fresh, rows), expected)
    card = json.loads((tmp_path / "luthier.json").read_text())
    assert card["parameters"] == sum(parameter.numel() for parameter in parameters(base, "t").values())


@each_family
@each_method
def test_a_row_does_not_depend_on_its_neighbours(family: str, method: str) -> None:
    base = tiny.make(family)
    attach(base, "t", METHODS[method])
    disturb(base, "t")
    base.use("t")
    rows = make_rows(base)
    together = scores(base, rows).split([len(row.target) for row in rows])
    for row, found in zip(rows, together, strict=True):
        torch.testing.assert_close(found, scores(base, [row]), atol=2e-5, rtol=1e-5)


@each_family
@each_method
def test_micro_batches_are_one_batch(family: str, method: str) -> None:
    base = tiny.make(family)
    attach(base, "t", METHODS[method])
    disturb(base, "t")
    base.use("t")
    rows = make_rows(base)

    def gradients(budget: int) -> dict[str, Tensor]:
        for parameter in parameters(base, "t").values():
            parameter.grad = None
        accumulate(base, rows, budget)
        return {
            key: parameter.grad.clone()
            for key, parameter in parameters(base, "t").items()
            if parameter.grad is not None
        }

    whole = gradients(10_000)
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for budget in (1, 30, 50):
        for key, gradient in gradients(budget).items():
            torch.testing.assert_close(gradient, whole[key], atol=1e-6 * max(1.0, largest), rtol=1e-4)


@each_family
def test_rows_of_one_batch_may_belong_to_different_tunings(family: str) -> None:
    base = tiny.make(family)
    attach(base, "lora", LoRA(rank=2), seed=1)
    attach(base, "prompt", PromptTuning(length=3, init="random"), seed=2)
    attach(base, "other", LoRA(rank=3, targets="all-linear"), seed=3)
    rows = make_rows(base, 7)
    plan: list[tuple[str | None, int]] = [("lora", 2), (None, 1), ("prompt", 3), ("other", 1)]
    expected, segments, start = [], [], 0
    for name, count in plan:
        if name:
            disturb(base, name)
        base.use(name)
        expected.append(scores(base, rows[start : start + count]))
        segments.append(Segment(name, start, start + count))
        start += count
    batch = batch_of(base, rows)
    mixed, _ = label_scores(base, type(batch)(**{**vars(batch), "segments": tuple(segments)}))
    torch.testing.assert_close(mixed, torch.cat(expected), atol=2e-5, rtol=1e-5)


@each_family
def test_parameter_counts_follow_the_formula(family: str) -> None:
    base = tiny.make(family)
    attach(base, "full", Full())
    unique = {id(parameter): parameter.numel() for parameter in tiny.make(family).model.parameters()}
    assert sum(parameter.numel() for parameter in parameters(base, "full").values()) == sum(unique.values())
    attach(base, "prompt", PromptTuning(length=7))
    assert sum(parameter.numel() for parameter in parameters(base, "prompt").values()) == 7 * base.width
    attach(base, "lora", LoRA(rank=3))
    linears = [
        tuple(module.weight.shape)
        for path, module in tiny.make(family).model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and path != "lm_head"
    ]
    assert linears
    assert sum(parameter.numel() for parameter in parameters(base, "lora").values()) == sum(
        3 * sum(one) for one in linears
    )


def test_the_worked_example_of_lora() -> None:
    """512 x 64 = 32,768 weights; r = 8 gives A 512 + B 4,096 = 4,608: 86 % fewer."""
    from luthier.tuning.lora import LowRank

    delta = LowRank((64, 512), rank=8, scale=2.0, dropout=0.0, generator=torch.Generator())
    assert delta.lora_A.weight.numel() == 512
    assert delta.lora_B.weight.numel() == 4096
    assert round(1 - 4608 / (512 * 64), 2) == 0.86


def test_lora_is_its_formula() -> None:
    from luthier.tuning.lora import LowRank

    delta = LowRank((6, 5), rank=2, scale=1.5, dropout=0.0, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(delta.lora_B.weight)
    x, w = torch.randn(4, 6), torch.randn(5, 6)
    expected = x @ (w + 1.5 * delta.lora_B.weight @ delta.lora_A.weight).T
    torch.testing.assert_close(delta(x, x @ w.T), expected)
