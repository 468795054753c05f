"""4-bit bases: the numbers are bitsandbytes' and the paper's, the product is a plain linear's, the rest is untouched."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import bitsandbytes.functional as oracle
import pytest
import torch
import torch.nn.functional as F
from tests import tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.errors import UserError
from luthier.models.base import BaseModel
from luthier.models.dense import dense_weight
from luthier.models.load import BaseSpec
from luthier.models.quantize import QuantizedLinear
from luthier.tuning import Full, LoRA, attach

FAMILIES = tiny.DECODERS + tiny.UNPACKED + tiny.ENCODER_DECODERS
each_family = pytest.mark.parametrize("family", FAMILIES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def layer_of(weight: torch.Tensor, bias: bool = True, double: bool = True) -> QuantizedLinear:
    made = nn.Parameter(torch.randn(weight.shape[0], dtype=weight.dtype)) if bias else None
    return QuantizedLinear(weight, made, torch.device("cpu"), double)


@each_family
@each_dtype
def test_every_linear_but_the_head_is_quantized_and_nothing_else(family: str, dtype: torch.dtype) -> None:
    plain, base = tiny.make(family, dtype), tiny.make(family, dtype, quantize="nf4")
    head = plain.model.get_output_embeddings()
    linears = {
        path: module
        for path, module in plain.model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    packed = {path: module for path, module in base.model.named_modules() if isinstance(module, QuantizedLinear)}
    assert packed.keys() == linears.keys() and packed
    for path, module in linears.items():
        weight = (module.weight.T if isinstance(module, Conv1D) else module.weight).detach()
        numbers, state = oracle.quantize_4bit(
            weight.reshape(-1, 64), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        expected = oracle.dequantize_4bit(numbers, state).reshape(weight.shape)
        assert expected.dtype == dtype
        assert torch.equal(dense_weight(packed[path]), expected.float()), path
    kept = {key: one for key, one in base.model.named_parameters() if not one.is_meta}
    before = dict(plain.model.named_parameters())
    assert kept.keys() == before.keys() - {f"{path}.weight" for path in packed}
    assert all(torch.equal(one, before[key]) for key, one in kept.items())


@pytest.mark.parametrize("shape", [(24, 48), (3, 32), (64, 64), (7, 9), (5, 100), (2, 576)])
def test_single_quantization_is_the_papers_formula(shape: tuple[int, int]) -> None:
    """Each block of 64 is divided by its largest magnitude and goes to the nearest of the 16 levels."""
    weight = torch.randn(shape)
    levels = oracle.get_4bit_type("nf4", device="cpu")
    assert levels.numel() == 16
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % 64)).reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / largest)[..., None].sub(levels).abs().argmin(-1)
    expected = (levels[nearest] * largest).flatten()[: weight.numel()].reshape(shape)
    torch.testing.assert_close(dense_weight(layer_of(weight, double=False)), expected, atol=1e-6, rtol=1e-6)
    twice = dense_weight(layer_of(weight, double=True))
    if len(blocks) > 1:  # (a single scale is its own mean)
        assert not torch.equal(twice, expected)
    torch.testing.assert_close(twice, expected, atol=0.1, rtol=0.05)


@each_dtype
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_a_plain_linear(dtype: torch.dtype, bias: bool) -> None:
    layer = layer_of(torch.randn(24, 40).to(dtype), bias)
    weight = layer.dequantized()
    for shape in ((40,), (7, 40), (2, 3, 40)):
        x = torch.randn(shape).to(dtype).requires_grad_()
        upstream = torch.randn(*shape[:-1], 24).to(dtype)
        ours, plain = layer(x), F.linear(x, weight, layer.bias)
        assert torch.equal(ours, plain)
        wanted = [x, layer.bias] if bias else [x]
        for found, expected in zip(
            torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(plain, wanted, upstream), strict=True
        ):
            torch.testing.assert_close(found, expected)


def test_only_the_packed_weight_lives_between_forward_and_backward() -> None:
    layer = layer_of(torch.randn(64, 64))
    saved: list[torch.Tensor] = []
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        layer(x).sum().backward()
    assert all(one.numel() < 64 * 64 for one in saved)
    assert layer.packed.numel() == 64 * 64 // 2 and layer.packed.dtype == torch.uint8


def held_bytes(base: BaseModel) -> int:
    """Bytes of all numbers the model holds, the quantization's own included."""
    total = sum(one.numel() * one.element_size() for one in base.grafts.originals.values() if not one.is_meta)
    for module in base.model.modules():
        if isinstance(module, QuantizedLinear):
            parts = [module.packed, module.state.absmax]
            parts += [module.state.state2.absmax] if module.state.nested else []
            total += sum(one.numel() * one.element_size() for one in parts)
    return total


@each_family
def test_a_quantized_base_is_the_same_base_in_less_memory(family: str) -> None:
    plain, base = tiny.make(family), tiny.make(family, quantize="nf4")
    assert base.fingerprint() == plain.fingerprint() != tiny.make(family, seed=1, quantize="nf4").fingerprint()
    assert base.parameter_count == plain.parameter_count
    assert (base.dtype, base.device, base.width) == (plain.dtype, plain.device, plain.width)
    packed = sum(one.numel() for one in base.grafts.originals.values() if one.is_meta)
    freed = held_bytes(plain) - held_bytes(base)
    assert freed > packed * (32 - 4.6) / 8 - 64 * len(base.grafts.modules)


def test_moving_a_quantized_model_keeps_its_numbers() -> None:
    base = tiny.make("llama", quantize="nf4")
    layer = base.model.model.layers[0].mlp.up_proj
    before = dense_weight(layer)
    base.model.to("cpu").to(torch.float32)
    assert torch.equal(dense_weight(layer), before)
    assert layer.weight.shape == before.shape and layer.weight.is_meta


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(UserError, match=r"needs bitsandbytes.*luthier\[quantize\]"):
        tiny.make("llama", quantize="nf4")


@each_family
def test_what_trains_the_packed_weights_themselves_is_refused_also_on_the_skeleton(family: str, tmp_path) -> None:
    plain = tiny.make(family)
    plain.model.save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    spec = BaseSpec(model=str(tmp_path), quantize="nf4", dtype="float32", device="cpu")
    for base in (BaseModel.skeleton(spec), BaseModel.load(spec)):
        with pytest.raises(UserError, match=r"'t' trains \d+ weights that the base keeps in 4 bits .* \(lora\)"):
            attach(base, "t", Full())
        assert base.grafts.names == []
        attach(base, "t", LoRA(rank=2))


@each_dtype
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(7, 9), (64, 64), (700, 576), (1025, 512)])
def test_a_weight_unpacked_by_parts_is_the_whole_one(shape: tuple[int, int], double: bool, dtype: torch.dtype) -> None:
    """(700, 576) has 6,300 blocks of the 4,096 unpacked at once; (7, 9) is no whole block."""
    layer = layer_of(torch.randn(shape, dtype=dtype), double=double)
    assert torch.equal(layer.unpacked(), layer.dequantized())


@pytest.mark.skipif(tiny.DEVICE.type == "cuda", reason="CUDA's allocator keeps a place for it by itself")
def test_linears_of_a_model_are_unpacked_into_one_place() -> None:
    base = tiny.make("llama", quantize="nf4")
    layers = [module for module in base.model.modules() if isinstance(module, QuantizedLinear)]
    first, *others = sorted(layers, key=lambda one: -one.weight.numel())
    place = first.unpacked().data_ptr()
    for layer in others:
        whole = layer.dequantized()
        found = layer.unpacked()
        assert found.data_ptr() == place and torch.equal(found, whole)
        assert whole.data_ptr() != place


@pytest.mark.parametrize(
    ("shape", "storage"), [((50, 30), torch.uint8), ((64, 64), torch.bfloat16), ((64, 64), torch.float32)]
)
def test_a_weight_is_unpacked_however_it_was_saved(shape: tuple[int, int], storage: torch.dtype) -> None:
    """(50, 30) in blocks as bitsandbytes itself cuts them: the last one is no whole one."""
    weight = torch.randn(shape)
    layer = layer_of(weight)
    layer.packed, layer.state = oracle.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4", quant_storage=storage
    )
    expected = oracle.dequantize_4bit(layer.packed, layer.state)
    assert torch.equal(layer.unpacked(), expected)


def test_each_thread_unpacks_into_a_place_of_its_own() -> None:
    base = tiny.make("llama", quantize="nf4")
    first, second = [one for one in base.model.modules() if isinstance(one, QuantizedLinear)][:2]
    with ThreadPoolExecutor(1) as other:
        mine = first.unpacked()
        other.submit(second.unpacked).result()
        assert torch.equal(mine, first.dequantized())
    with torch.inference_mode():
        first.unpacked()
    assert torch.equal(first.unpacked(), first.dequantized())
    assert copy.deepcopy(first).unpacked().data_ptr() != first.unpacked().data_ptr()
