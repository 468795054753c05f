"""What can be chosen, what a model does not have, and both sides of a tie."""

from pathlib import Path

import pytest
import torch
from tests import tiny

from luthier.errors import UserError
from luthier.tuning import LoRA, Selective, attach, parameters
from luthier.tuning.files import save_tuning


def owned(family: str, targets, untie: bool = False) -> set[str]:
    base = tiny.make(family)
    attach(base, "t", Selective(targets=targets, untie=untie))
    return set(parameters(base, "t"))


def test_words_and_patterns_choose_parameters() -> None:
    llama = tiny.make("llama").grafts.originals
    assert owned("llama", "layernorm") == {key for key in llama if "norm" in key}
    assert owned("llama", "last-1-block") == {key for key in llama if ".layers.1." in key}
    assert owned("llama", "last-9-blocks") == {key for key in llama if ".layers." in key}
    assert owned("llama", ["q_proj", "*.0.mlp.up_proj.weight"]) == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    }
    assert owned("qwen2", "bias") == {key for key in tiny.make("qwen2").grafts.originals if key.endswith(".bias")}
    assert owned("qwen2", "head") == {"lm_head.weight"}
    assert owned("t5", "last-1-block") == {key for key in tiny.make("t5").grafts.originals if ".block.1." in key}
    gpt2 = owned("gpt2", "bias")
    assert "transformer.ln_f.bias" in gpt2 and "transformer.h.0.attn.c_attn.bias" in gpt2


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "t5"])
def test_a_model_without_biases_says_what_it_has(family: str) -> None:
    base = tiny.make(family)
    with pytest.raises(UserError, match=rf"This {family} model has no biases\. It has layernorm \(\d+ norms\), emb"):
        attach(base, "t", Selective(targets="bias"))
    assert base.grafts.names == []


def test_a_pattern_that_means_nothing_names_near_misses() -> None:
    with pytest.raises(UserError, match=r"'layernorms' is nothing to train here. Did you mean 'layernorm'\?"):
        attach(tiny.make("llama"), "t", Selective(targets="layernorms"))
    with pytest.raises(ValueError, match="targets is empty"):
        Selective(targets=[])


@pytest.mark.parametrize(
    ("family", "targets", "others"),
    [
        ("llama", "embeddings", "lm_head.weight"),
        ("llama", "head", "model.embed_tokens.weight"),
        ("llama", "lm_head", "model.embed_tokens.weight"),
        ("gpt2", ["layernorm", "*wte*"], "lm_head.weight"),
        ("t5", "head", "shared.weight, encoder.embed_tokens.weight, decoder.embed_tokens.weight"),
        ("t5", "embeddings", "lm_head.weight"),
    ],
)
def test_one_side_of_a_tie_needs_untie(family: str, targets, others: str) -> None:
    base = tiny.make(family)
    with pytest.raises(UserError, match=r"is tied to .*`untie: true`") as caught:
        attach(base, "t", Selective(targets=targets))
    assert others in str(caught.value)
    assert base.grafts.names == []


@pytest.mark.parametrize("family", ["llama", "t5", "opt"])
def test_both_sides_of_a_tie_are_one_tensor_and_one_untied_is_its_own(family: str) -> None:
    base = tiny.make(family)
    table = base.embedding.weight
    attach(base, "both", Selective(targets=["embeddings", "head"]))
    attach(base, "head", Selective(targets="head", untie=True))
    attach(base, "embeddings", Selective(targets="embeddings", untie=True))
    head = lambda: base.model.get_output_embeddings().weight  # noqa: E731
    for name in ("both", "head", "embeddings"):
        assert [one.numel() for one in parameters(base, name).values()] == [table.numel()]
    base.use("both")
    assert base.embedding.weight is head() and head() is not table
    base.use("head")
    assert base.embedding.weight is table and head() is not table
    base.use("embeddings")
    assert base.embedding.weight is not table and head() is table
    base.use(None)
    assert base.embedding.weight is table and head() is table


def test_lora_trains_a_tied_module_whole_only_when_untied() -> None:
    base = tiny.make("llama")
    with pytest.raises(UserError, match="untie: true"):
        attach(base, "t", LoRA(modules_to_save=["lm_head"]))
    with pytest.raises(UserError, match="modules_to_save: 'lm_heat' is no module"):
        attach(base, "t", LoRA(modules_to_save=["lm_heat"]))
    assert base.grafts.names == []


def test_only_whole_norms_are_pefts_layer_norm_tuning(tmp_path: Path) -> None:
    base = tiny.make("gpt2")
    for name, targets in {
        "norms": "layernorm",
        "half": "*ln_1.weight",
        "more": ["layernorm", "head", "embeddings"],
    }.items():
        attach(base, name, Selective(targets=targets))
        save_tuning(base, name, tmp_path / name)
    found = [(tmp_path / name / "adapter_config.json").is_file() for name in ("norms", "half", "more")]
    assert found == [True, False, False]


def test_weights_in_few_bits_are_refused() -> None:
    base = tiny.make("llama")
    key = "model.layers.0.mlp.up_proj.weight"
    base.grafts.originals[key] = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match=r"up_proj.weight is stored in few bits.*method: lora"):
        attach(base, "t", Selective(targets="last-2-blocks"))


def test_small_parameters_learn_faster() -> None:
    assert Selective(targets=["bias", "layernorm"]).defaults.learning_rate == Selective().defaults.learning_rate
    assert Selective(targets=["bias", "head"]).defaults.learning_rate < Selective().defaults.learning_rate
