"""The laws of the contract on a 4-bit base: what trains beside the weights keeps them, whatever they are stored in."""

from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.laws.cases import DTYPES, FAMILIES, METHOD_CASES, VARIANTS
from tests.laws.test_methods import batch_of, disturb, make_rows, scores
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from luthier.encoding.order import Shuffled
from luthier.models.base import BaseModel
from luthier.models.dense import dense_weight
from luthier.models.loss import loss_sum
from luthier.models.quantize import QuantizedLinear
from luthier.training.loop import train
from luthier.training.settings import TrainingSettings
from luthier.tuning import LoRA, Method, PromptTuning, attach, detach, parameters
from luthier.tuning.files import load_tuning, save_tuning

METHODS: dict[str, Method] = {"lora": LoRA(rank=2, alpha=4), "prompt_tuning": PromptTuning(length=3, init="vocabulary")}

each_family = pytest.mark.parametrize("family", FAMILIES)
each_method = pytest.mark.parametrize("method", METHODS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


def bits(base: BaseModel) -> dict[str, Tensor]:
    """Every number of the base: plain parameters, packed weights and their scales."""
    found = {key: one.detach().clone() for key, one in base.grafts.originals.items() if not one.is_meta}
    for path, module in base.grafts.modules.items():
        if isinstance(module, QuantizedLinear):
            found |= {f"{path} packed": module.packed.clone(), f"{path} scales": module.state.absmax.clone()}
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@each_family
@each_method
@each_dtype
def test_a_fresh_tuning_is_the_base_and_detaching_restores_it(family: str, method: str, dtype: torch.dtype) -> None:
    base = tiny.make(family, dtype, quantize="nf4")
    rows = make_rows(base)
    before, numbers = scores(base, rows), bits(base)
    assert not torch.equal(before, scores(tiny.make(family, dtype), rows)), "nothing was quantized"
    attach(base, "t", METHODS[method])
    assert torch.equal(scores(base, rows), before)
    base.use("t")
    if method == "lora":
        assert torch.equal(scores(base, rows), before)
    disturb(base, "t")
    assert not torch.equal(scores(base, rows), before)
    base.use(None)
    assert torch.equal(scores(base, rows), before)
    detach(base, "t")
    assert torch.equal(scores(base, rows), before)
    assert same(bits(base), numbers)


@each_family
@each_method
@each_dtype
def test_training_moves_what_is_owned_and_nothing_else(
    family: str, method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = tiny.make(family, dtype, quantize="nf4")
    before = bits(base)
    attach(base, "t", METHODS[method])
    start = {key: parameter.detach().clone() for key, parameter in parameters(base, "t").items()}
    settings = TrainingSettings(max_steps=3, batch_size=4, learning_rate=1e-2, warmup=0.0)
    train(base, "t", Shuffled(make_rows(base), 0), settings, 0, tmp_path)
    assert same(bits(base), before)
    still = [key for key, parameter in parameters(base, "t").items() if torch.equal(parameter, start[key])]
    assert len(still) <= len(start) // 4, f"owned but never moved: {still}"


@each_family
@each_method
def test_save_and_load_restore_the_bits_on_either_storage(family: str, method: str, tmp_path: Path) -> None:
    base = tiny.make(family, quantize="nf4")
    rows = make_rows(base)
    attach(base, "t", METHODS[method], seed=5)
    disturb(base, "t")
    base.use("t")
    save_tuning(base, "t", tmp_path)
    assert '"quantized": true' in (tmp_path / "luthier.json").read_text()
    again, plain = tiny.make(family, quantize="nf4"), tiny.make(family)
    for other in (again, plain):
        load_tuning(other, tmp_path, "t")
        assert same(dict(parameters(other, "t")), dict(parameters(base, "t")))
    again.use("t")
    assert torch.equal(scores(again, rows), scores(base, rows))


# Whole weights of the quantized linears are the one thing that 4 bits cannot train.
OTHERS = {name: (one, FAMILIES) for name, one in METHOD_CASES.items() if name not in (*METHODS, "full")} | {
    name: one for name, one in VARIANTS.items() if name not in ("selective-last-block", "selective-pattern")
}


@pytest.mark.parametrize(
    ("method", "family"), [(name, family) for name, (_, families) in OTHERS.items() for family in families[:2]]
)
def test_every_other_method_keeps_the_laws(method: str, family: str, tmp_path: Path) -> None:
    """Identity at the start, only what is owned moves, files restore it, detaching restores the base."""
    base, one = tiny.make(family, quantize="nf4"), OTHERS[method][0]
    rows = make_rows(base, 4)
    before, numbers = scores(base, rows), bits(base)
    attach(base, "t", one)
    base.use("t")
    assert torch.equal(scores(base, rows), before) == one.laws.identity_at_start.holds
    start = {key: parameter.detach().clone() for key, parameter in parameters(base, "t").items()}
    settings = TrainingSettings(max_steps=3, batch_size=4, learning_rate=1e-2, warmup=0.0)
    train(base, "t", Shuffled(rows, 0), settings, 0, tmp_path)
    assert same(bits(base), numbers)
    still = [key for key, parameter in parameters(base, "t").items() if torch.equal(parameter, start[key])]
    assert len(still) <= len(start) // 4, f"owned but never moved: {still}"
    base.use("t")
    trained = scores(base, rows)
    save_tuning(base, "t", tmp_path)
    again = tiny.make(family, quantize="nf4")
    load_tuning(again, tmp_path, "t")
    again.use("t")
    assert torch.equal(scores(again, rows), trained)
    detach(base, "t")
    assert torch.equal(scores(base, rows), before) and same(bits(base), numbers)


@each_family
def test_gradients_are_those_of_the_dequantized_base(family: str) -> None:
    """QLoRA is LoRA on the numbers that the 4 bits stand for."""
    base, plain = tiny.make(family, quantize="nf4"), tiny.make(family)
    with torch.no_grad():
        for path, module in base.grafts.modules.items():
            if isinstance(module, QuantizedLinear):
                other = plain.grafts.modules[path]
                numbers = dense_weight(module)
                other.weight.copy_(numbers.T if isinstance(other, Conv1D) else numbers)
    rows = make_rows(base)
    gradients = []
    for one in (base, plain):
        attach(one, "t", LoRA(rank=2), seed=3)
        torch.manual_seed(1)
        disturb(one, "t")
        one.use("t")
        owned = parameters(one, "t")
        gradients.append(
            dict(zip(owned, torch.autograd.grad(loss_sum(one, batch_of(one, rows)), list(owned.values())), strict=True))
        )
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], atol=1e-4, rtol=1e-3)
