"""The laws of the contract, for every trained method on every family.

identity at start; only owned parameters move; detach and swap restore the base's bits; save and load
restore bits; merged equals unmerged; a row does not depend on its neighbours, nor on other tunings' rows in its batch;
micro-batches are one batch; counts follow the formula. Which of the optional ones hold, each method says itself.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.laws.cases import (
    FAMILIES,
    METHOD_CASES,
    Case,
    count,
    each_case_and_dtype,
    each_case_that_merges,
    each_case_with_formula,
)
from tests.merged import merged_copy
from torch import Tensor

from luthier.encoding.batches import collate
from luthier.encoding.encoder import Encoded
from luthier.encoding.order import Shuffled
from luthier.errors import UserError
from luthier.models.base import BaseModel
from luthier.models.batch import Segment
from luthier.models.loss import label_scores
from luthier.training.loop import accumulate, train
from luthier.training.settings import TrainingSettings
from luthier.tuning import METHODS, Full, LoRA, PrefixTuning, PromptTuning, attach, detach, parameters
from luthier.tuning.files import load_tuning, save_tuning


def make_rows(base: BaseModel, count: int = 6, seed: int = 0) -> list[Encoded]:
    draw = random.Random(seed)
    top = base.embedding.weight.shape[0] - 1
    tokens = lambda least, most: [draw.randint(3, top) for _ in range(draw.randint(least, most))]  # noqa: E731
    return [Encoded(f"row {number}", tokens(4, 16), tokens(2, 6)) for number in range(count)]


def batch_of(base: BaseModel, rows: list[Encoded], segments: tuple[Segment, ...] = ()):
    batch = collate(rows, base.decoder_start if base.encoder_decoder else None).to(base.device)
    return replace(batch, segments=segments)


def scores(base: BaseModel, rows: list[Encoded]) -> Tensor:
    return label_scores(base, batch_of(base, rows))[0]


def disturb(base: BaseModel, name: str) -> None:
    """Move a tuning away from its start, as training would."""
    with torch.no_grad():
        for parameter in parameters(base, name).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def bits(base: BaseModel) -> dict[str, Tensor]:
    return {key: parameter.detach().clone() for key, parameter in base.grafts.originals.items()}


def weights(base: BaseModel, name: str) -> dict[str, Tensor]:
    return {key: parameter.detach().clone() for key, parameter in parameters(base, name).items()}


@each_case_and_dtype
def test_a_fresh_tuning_is_the_base_and_detaching_restores_it(case: Case) -> None:
    base = tiny.make(case.family, case.dtype)
    rows = make_rows(base)
    before, tree = scores(base, rows), [path for path, _ in base.model.named_modules()]
    attach(base, "t", case.method)
    assert torch.equal(scores(base, rows), before), "attaching must not change the bare base"
    base.use("t")
    assert torch.equal(scores(base, rows), before) == case.method.laws.identity_at_start.holds
    disturb(base, "t")
    assert not torch.equal(scores(base, rows), before), "the tuning has no effect"
    detach(base, "t")
    assert torch.equal(scores(base, rows), before)
    assert [path for path, _ in base.model.named_modules()] == tree


@each_case_and_dtype
def test_training_moves_what_is_owned_and_nothing_else(case: Case, tmp_path: Path) -> None:
    base = tiny.make(case.family, case.dtype)
    before = bits(base)
    attach(base, "t", case.method)
    attach(base, "bystander", LoRA(rank=1, targets=["all-linear", "lm_head"]))
    idle, start = weights(base, "bystander"), weights(base, "t")
    settings = TrainingSettings(max_steps=3, batch_size=4, learning_rate=1e-2, warmup=0.0)
    train(base, "t", Shuffled(make_rows(base), 0), settings, 0, tmp_path)
    for key, tensor in bits(base).items():
        assert torch.equal(tensor, before[key]), f"the base's {key} moved"
    for key, parameter in parameters(base, "bystander").items():
        assert torch.equal(parameter, idle[key]), f"another tuning's {key} moved"
    still = [key for key, parameter in parameters(base, "t").items() if torch.equal(parameter, start[key])]
    assert len(still) <= len(start) // 4, f"owned but never moved: {still}"


@each_case_and_dtype
def test_swapping_is_bit_exact_however_often(case: Case) -> None:
    base = tiny.make(case.family, case.dtype)
    rows = make_rows(base, 3)
    before = scores(base, rows)
    others = {
        "a": case.method,
        "b": LoRA(rank=1),
        "c": Full(),
        "d": PromptTuning(length=2),
        "e": PrefixTuning(length=2),
    }
    for name, other in others.items():
        attach(base, name, other)
        disturb(base, name)
    expected: dict[str | None, Tensor] = {None: before}
    for name in others:
        base.use(name)
        expected[name] = scores(base, rows)
    for name in [*"abcdacbeda", None]:
        base.use(name)
        assert torch.equal(scores(base, rows), expected[name])


@each_case_and_dtype
def test_save_and_load_restore_the_bits(case: Case, tmp_path: Path) -> None:
    base = tiny.make(case.family, case.dtype)
    rows = make_rows(base)
    attach(base, "t", case.method, seed=5)
    disturb(base, "t")
    base.use("t")
    expected = scores(base, rows)
    save_tuning(base, "t", tmp_path)
    fresh = tiny.make(case.family, case.dtype)
    load_tuning(fresh, tmp_path, "again")
    if case.method.saved() == case.method:
        for key, parameter in parameters(fresh, "again").items():
            assert torch.equal(parameter, parameters(base, "t")[key])
    fresh.use("again")
    assert torch.equal(scores(fresh, rows), expected)
    size, weights_file = save_tuning(fresh, "again", tmp_path / "again"), "adapter_model.safetensors"
    assert (tmp_path / "again" / weights_file).read_bytes() == (tmp_path / weights_file).read_bytes()
    assert size == sum(file.stat().st_size for file in (tmp_path / "again").iterdir())
    card = json.loads((tmp_path / "luthier.json").read_text())
    assert card["parameters"] == sum(parameter.numel() for parameter in parameters(base, "t").values())


@each_case_that_merges
def test_merged_equals_unmerged(case: Case) -> None:
    base = tiny.make(case.family, case.dtype)
    rows = make_rows(base)
    attach(base, "t", case.method)
    disturb(base, "t")
    base.use("t")
    tolerance = 1e-4 if case.dtype == torch.float32 else 0.15  # bf16 has 8 bits of each weight and activation
    torch.testing.assert_close(scores(merged_copy(base, "t"), rows), scores(base, rows), atol=tolerance, rtol=tolerance)


@each_case_and_dtype
def test_a_row_does_not_depend_on_its_neighbours(case: Case) -> None:
    base = tiny.make(case.family, case.dtype)
    attach(base, "t", case.method)
    disturb(base, "t")
    base.use("t")
    rows = make_rows(base)
    together = scores(base, rows).split([len(row.target) for row in rows])
    # A matrix product may sum in another order where it has other rows beside: a rounding of bf16's 8 bits.
    close = (2e-5, 1e-5) if case.dtype == torch.float32 else (0.05, 0.01)
    for row, found in zip(rows, together, strict=True):
        torch.testing.assert_close(found, scores(base, [row]), atol=close[0], rtol=close[1])


@each_case_and_dtype
def test_micro_batches_are_one_batch(case: Case) -> None:
    base = tiny.make(case.family, case.dtype)
    attach(base, "t", case.method)
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
    # In bf16 each micro-batch's gradient is rounded to 8 bits, and a weight of the base's own adds up its own in them.
    close = (1e-6 * max(1.0, largest), 1e-4) if case.dtype == torch.float32 else (largest / 32, 0.0)
    for budget in (1, 40):
        for key, gradient in gradients(budget).items():
            torch.testing.assert_close(gradient, whole[key], atol=close[0], rtol=close[1])


@each_case_and_dtype
def test_rows_of_one_batch_may_belong_to_different_tunings(case: Case) -> None:
    base = tiny.make(case.family, case.dtype)
    attach(base, "t", case.method, seed=1)
    attach(base, "prompt", PromptTuning(length=3, init="random"), seed=2)
    attach(base, "prefix", PrefixTuning(length=4), seed=3)
    attach(base, "lora", LoRA(rank=3, targets=["all-linear", "embeddings", "lm_head"]), seed=4)
    rows = make_rows(base, 9)
    plan: list[tuple[str | None, int]] = [("lora", 2), (None, 1), ("prompt", 1), ("t", 3), ("prefix", 2)]
    expected, segments, start = [], [], 0
    for name, rows_of in plan:
        if name:
            disturb(base, name)
        base.use(name)
        expected.append(scores(base, rows[start : start + rows_of]))
        segments.append(Segment(name, start, start + rows_of))
        start += rows_of
    batch = batch_of(base, rows, tuple(segments))
    if not case.method.laws.mixed_batches.holds:
        with pytest.raises(UserError, match="'t' replaces whole weights"):
            label_scores(base, batch)
        alone = batch_of(base, rows[4:7], (Segment("t", 0, 3),))
        assert torch.equal(label_scores(base, alone)[0], expected[3])
        return
    mixed, _ = label_scores(base, batch)
    close = (5e-5, 1e-5) if case.dtype == torch.float32 else (0.05, 0.01)
    torch.testing.assert_close(mixed, torch.cat(expected), atol=close[0], rtol=close[1])


INTERPOLATES = ("full", "selective", "lora", "bottleneck", "ia3")


@each_case_and_dtype
def test_a_share_of_a_tuning_is_between_it_and_the_base(case: Case) -> None:
    base = tiny.make(case.family, case.dtype)
    rows = make_rows(base, 3)
    before = scores(base, rows)
    attach(base, "t", case.method)
    disturb(base, "t")
    base.use("t")
    start, whole = weights(base, "t"), scores(base, rows)
    if case.method.method not in INTERPOLATES or getattr(case.method, "dora", False):
        with pytest.raises(UserError, match="[Ii]nterpolate"):
            case.method.toward_base(base, "t", 0.5)
        return
    case.method.toward_base(base, "t", 1.0)
    assert torch.equal(scores(base, rows), whole), "a share of 1 is the tuning, bit for bit"
    if case.method.laws.merge.holds and case.dtype == torch.float32:
        merged = dict(merged_copy(base, "t").model.named_parameters())
        case.method.toward_base(base, "t", 0.25)
        found = dict(merged_copy(base, "t").model.named_parameters())
        for key, original in tiny.make(case.family).model.named_parameters():
            torch.testing.assert_close(found[key], original + 0.25 * (merged[key] - original), atol=1e-6, rtol=1e-5)
    elif case.method.method in ("full", "selective"):
        case.method.toward_base(base, "t", 0.25)
        places = {place: key for key, slots in base.grafts.slots.items() for place in slots}
        for key, parameter in parameters(base, "t").items():
            original = base.grafts.originals[places[key]].float()
            expected = (original + 0.25 * (start[key].float() - original)).to(case.dtype)
            torch.testing.assert_close(parameter, expected)
    case.method.toward_base(base, "t", 0.0)
    assert torch.equal(scores(base, rows), before), "a share of 0 is the base, bit for bit"


@each_case_with_formula
def test_parameter_counts_follow_the_formula(case: Case) -> None:
    base = tiny.make(case.family)
    attach(base, "t", case.method)
    owned = sum(parameter.numel() for parameter in parameters(base, "t").values())
    assert owned == count(tiny.make(case.family), case.method)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_attaches_to_a_skeleton(family: str) -> None:
    """A run tries its tunings on a base without weights before hours of work."""
    base = tiny.make(family)
    skeleton = BaseModel(base.model.to("meta"), base.tokenizer)
    for name, kind in METHODS.items():
        if name in METHOD_CASES:
            attach(skeleton, name, kind())
            owned = parameters(skeleton, name).values()
            assert owned and all(parameter.numel() for parameter in owned), f"{name} grafted nothing"
            detach(skeleton, name)
            assert name not in skeleton.grafts.names
