"""A tuning folded into the weights: in memory with the originals kept, and as an ordinary transformers directory."""

from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.laws.cases import FAMILIES
from tests.laws.test_methods import batch_of, bits, disturb, make_rows, scores
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from luthier.encoding.encoder import Encoded
from luthier.errors import UserError
from luthier.models.base import BaseModel
from luthier.models.export import merged_weights, requantize, write_model
from luthier.models.grafted import Delta
from luthier.models.load import BaseSpec
from luthier.models.run import target_states
from luthier.tuning import Full, LoRA, Method, PromptTuning, attach, detach, parameters

METHODS: dict[str, Method] = {"lora": LoRA(rank=2, alpha=4), "full": Full()}
each_family = pytest.mark.parametrize("family", FAMILIES)
each_method = pytest.mark.parametrize("method", METHODS)


def tuned(family: str, method: Method, dtype: torch.dtype = torch.float32, quantize=None) -> BaseModel:
    base = tiny.make(family, dtype, quantize=quantize)
    attach(base, "t", method)
    disturb(base, "t")
    base.use("t")
    return base


def plain_logits(folder: Path, row: Encoded, encoder_decoder: bool) -> Tensor:
    """Logits at the row's targets from transformers alone, in eager attention."""
    kind = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    model, found = kind.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    with torch.no_grad():
        if encoder_decoder:
            return model(input_ids=torch.tensor([row.prompt]), labels=torch.tensor([row.target])).logits[0]
        ids = torch.tensor([row.prompt + row.target])
        return model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1]


def our_logits(base: BaseModel, row: Encoded) -> Tensor:
    with torch.no_grad():
        return base.logits(target_states(base, batch_of(base, [row])))


@each_family
@pytest.mark.parametrize(("method", "quantize"), [("lora", None), ("lora", "nf4"), ("full", None)])
def test_the_directory_gives_the_tunings_logits_without_luthier(
    family: str, method: str, quantize: str | None, tmp_path: Path
) -> None:
    base = tuned(family, METHODS[method], quantize=quantize)
    before = bits(base) if not quantize else {}
    write_model(base, merged_weights(base, "t", torch.float32), tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in tmp_path.iterdir()}
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(base.tokenizer)
    row = make_rows(base, 1)[0]
    expected = our_logits(base, row)
    base.use(None)
    assert not torch.allclose(our_logits(base, row), expected, atol=1e-2), "the tuning has no effect"
    torch.testing.assert_close(plain_logits(tmp_path, row, base.encoder_decoder), expected, atol=5e-5, rtol=1e-4)
    for key, tensor in before.items():
        assert torch.equal(base.grafts.originals[key], tensor)


@each_family
@each_method
def test_merged_in_memory_is_the_tuning_and_the_originals_come_back_bit_for_bit(family: str, method: str) -> None:
    base = tiny.make(family)
    rows, before = make_rows(base), bits(base)
    bare = scores(base, rows)
    attach(base, "t", METHODS[method])
    attach(base, "other", LoRA(rank=1, targets="all-linear"), seed=1)
    for name in ("t", "other"):
        disturb(base, name)
    base.use("t")
    unmerged = scores(base, rows)
    base.use("other")
    other = scores(base, rows)
    for _ in range(3):
        base.use("t", merged=True)
        if method == "lora":  # no delta is computed
            assert all(part[0] is None for part in base.grafts.route.parts)
        torch.testing.assert_close(scores(base, rows), unmerged, atol=5e-5, rtol=1e-5)
        base.use("other")
        assert torch.equal(scores(base, rows), other)
        base.use("t", merged=True)
        base.use(None)
        assert torch.equal(scores(base, rows), bare)
        assert all(torch.equal(one, before[key]) for key, one in base.grafts.originals.items())
    base.use("t", merged=True)
    detach(base, "t")
    assert torch.equal(scores(base, rows), bare)
    for path, module in base.grafts.modules.items():
        for key, parameter in module.named_parameters(recurse=False):
            assert any(parameter is one for one in base.grafts.originals.values()), f"{path}.{key} is no original"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_merging_into_a_tied_head_unties_it_and_leaves_the_embeddings(family: str, tmp_path: Path) -> None:
    base = tuned(family, LoRA(rank=2, targets="lm_head"))
    assert base.embedding.weight is base.grafts.modules["lm_head"].weight, "the head is not tied"
    row = make_rows(base, 1)[0]
    expected = our_logits(base, row)
    weights = merged_weights(base, "t", torch.float32)
    write_model(base, weights, tmp_path)
    torch.testing.assert_close(plain_logits(tmp_path, row, False), expected, atol=5e-5, rtol=1e-4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.tie_word_embeddings is False
    embeddings = base.embedding.weight.clone()
    base.use("t", merged=True)
    torch.testing.assert_close(our_logits(base, row), expected, atol=5e-5, rtol=1e-4)
    assert torch.equal(base.embedding.weight, embeddings)


@pytest.mark.parametrize("family", ["t5", "t5-gated"])
def test_a_tied_t5_keeps_the_scale_of_its_states_when_it_is_untied(family: str, tmp_path: Path) -> None:
    base = tuned(family, LoRA(rank=2, targets="lm_head"))
    row = make_rows(base, 1)[0]
    write_model(base, merged_weights(base, "t", torch.float32), tmp_path)
    torch.testing.assert_close(plain_logits(tmp_path, row, True), our_logits(base, row), atol=5e-5, rtol=1e-4)


def test_the_sum_is_rounded_once() -> None:
    base = tuned("llama", LoRA(rank=2, alpha=4), torch.bfloat16)
    path = "model.layers.0.mlp.up_proj"
    owned = parameters(base, "t")
    product = owned[f"{path}.lora_B.weight"].float() @ owned[f"{path}.lora_A.weight"].float()
    exact = base.grafts.modules[path].weight.float() + 2.0 * product
    found = merged_weights(base, "t", torch.bfloat16)[f"{path}.weight"]
    assert torch.equal(found, exact.to(torch.bfloat16))


class Rescale(Delta):
    """y * s, as IA3 rescales keys and values: rows of the weight, and the bias."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.scale

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.scale[:, None], None if bias is None else bias * self.scale


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("llama", "model.layers.1.self_attn.k_proj"),
        ("qwen2", "model.layers.1.self_attn.k_proj"),
        ("gpt2", "transformer.h.0.mlp.c_fc"),
        ("opt", "model.decoder.layers.0.fc1"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.v"),
    ],
)
def test_any_delta_that_says_how_it_folds_is_merged(
    family: str, path: str, quantize: str | None, tmp_path: Path
) -> None:
    """With a bias and without, in a linear stored either way round, beside whole weights of the tuning's own."""
    base = tiny.make(family, quantize=quantize)
    row = make_rows(base, 1)[0]
    bare = our_logits(base, row)
    base.grafts.claim("t")
    base.grafts.graft_module(
        path, "t", Rescale(base.grafts.modules[path].weight.shape[family == "gpt2" and not quantize])
    )
    norm = next(key for key in base.grafts.originals if "norm" in key or "ln_1.weight" in key)
    base.grafts.substitute("t", {norm: nn.Parameter(base.grafts.originals[norm].detach() * 1.2)})
    base.use("t")
    expected = our_logits(base, row)
    assert not torch.allclose(expected, bare, atol=1e-3)
    write_model(base, merged_weights(base, "t", torch.float32), tmp_path)
    torch.testing.assert_close(plain_logits(tmp_path, row, base.encoder_decoder), expected, atol=5e-5, rtol=1e-4)
    if not quantize:
        base.use("t", merged=True)
        torch.testing.assert_close(our_logits(base, row), expected, atol=5e-5, rtol=1e-4)
    base.use(None)
    assert torch.equal(our_logits(base, row), bare)


class Shift(Rescale):
    """A bias for a linear that has none."""

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, self.scale


def test_a_bias_that_the_architecture_has_no_place_for_is_refused() -> None:
    base = tiny.make("llama")
    base.grafts.claim("t")
    base.grafts.graft_module("model.layers.0.mlp.up_proj", "t", Shift(48))
    with pytest.raises(UserError, match="gives model.layers.0.mlp.up_proj a bias, and this architecture has none"):
        merged_weights(base, "t", torch.float32)


class Squash(Delta):
    """No weights give this."""

    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.size * torch.tanh(y)


def test_what_is_in_no_weight_is_refused_and_says_why() -> None:
    base = tiny.make("llama")
    attach(base, "prompt", PromptTuning(length=2))
    base.grafts.claim("squash")
    base.grafts.graft_module("model.layers.0.mlp", "squash", Squash())
    rows = make_rows(base)
    bare = scores(base, rows)
    for name, message in (
        ("prompt", "prompt_embeddings stand before the rows"),
        ("squash", "layers.0.mlp is no change"),
    ):
        with pytest.raises(UserError, match=f"'{name}' cannot be merged: .*{message}"):
            merged_weights(base, name, torch.float32)
        with pytest.raises(UserError, match="cannot be merged"):
            base.use(name, merged=True)
        base.use(None)
        assert torch.equal(scores(base, rows), bare)


def test_merging_in_memory_onto_4_bits_is_refused() -> None:
    base = tuned("llama", LoRA(rank=2), quantize="nf4")
    with pytest.raises(UserError, match="cannot be merged in memory: the base keeps .* in 4 bits"):
        base.use("t", merged=True)


@each_family
def test_a_requantized_directory_is_read_as_a_base_of_the_same_numbers(family: str, tmp_path: Path) -> None:
    """What transformers packs with bitsandbytes is taken over packed: the numbers are those of packing here."""
    base = tuned(family, LoRA(rank=2, alpha=4), quantize="nf4")
    write_model(base, merged_weights(base, "t", torch.float32), tmp_path / "dense")
    requantize(base, tmp_path / "dense", tmp_path / "packed", torch.float32)
    spec = BaseSpec(model=str(tmp_path / "packed"), dtype="float32", device="cpu")
    packed = BaseModel.load(spec)
    assert packed.quantized and not any(type(module).__name__ == "Linear4bit" for module in packed.model.modules())
    rows = make_rows(base)
    if family not in tiny.ENCODER_DECODERS:  # (of a T5, transformers leaves `wo` unquantized)
        again = BaseModel.load(BaseSpec(model=str(tmp_path / "dense"), dtype="float32", device="cpu", quantize="nf4"))
        torch.testing.assert_close(scores(packed, rows), scores(again, rows))
    attach(packed, "more", LoRA(rank=2))
    packed.use("more")
    assert packed.fingerprint() == BaseModel.load(spec).fingerprint()
    for found in (packed, BaseModel.skeleton(spec)):
        with pytest.raises(UserError, match="keeps in 4 bits"):
            attach(found, "full", Full())


class Nudge(Delta):
    """A table's rows moved for themselves."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(shape) * 0.05)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + torch.nn.functional.embedding(x, self.rows)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.rows, bias


def test_a_delta_on_tied_embeddings_leaves_the_head(tmp_path: Path) -> None:
    base = tiny.make("llama")
    base.grafts.claim("t")
    base.grafts.graft_module("model.embed_tokens", "t", Nudge(base.embedding.weight.shape))
    base.use("t")
    row = make_rows(base, 1)[0]
    weights = merged_weights(base, "t", torch.float32)
    assert torch.equal(weights["lm_head.weight"], base.grafts.originals["model.embed_tokens.weight"])
    write_model(base, weights, tmp_path)
    torch.testing.assert_close(plain_logits(tmp_path, row, False), our_logits(base, row), atol=5e-5, rtol=1e-4)
