"""The PEFT library opens our files and we open its: the same logits in float64, on tiny bases of four families."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.logits import all_logits

from luthier.models.base import BaseModel
from luthier.tuning import IA3, LoRA, Method, PrefixTuning, PromptTuning, Selective, attach, parameters
from luthier.tuning.files import load_tuning, save_tuning

peft = pytest.importorskip("peft")

FAMILIES = ("llama", "gpt2", "gemma2", "t5-gated")
OURS: dict[str, Method] = {
    "lora": LoRA(rank=3, alpha=7),
    "rslora": LoRA(rank=3, rslora=True, targets="attention"),
    "dora": LoRA(rank=2, dora=True),
    "patterns": LoRA(rank=2, rank_pattern={r".*0\..*": 4}, alpha_pattern={r".*1\..*": 3.0}, layers=[0, 1]),
    "modules-to-save": LoRA(rank=2, modules_to_save=["lm_head"], untie=True),
    "prompt": PromptTuning(length=4, init="vocabulary"),
    "prefix": PrefixTuning(length=5),
    "prefix-network": PrefixTuning(length=5, reparametrise=True, hidden=8),
    "ia3": IA3(),
    "layernorm": Selective(targets="layernorm"),
}
# What PEFT calls the embeddings of each; T5's decoder has its own table.
EMBEDDINGS = {"llama": ["embed_tokens"], "gpt2": ["wte"], "gemma2": ["embed_tokens"], "t5-gated": ["embed_tokens"]}
QUERY_VALUE = {"gpt2": ["c_attn"], "t5-gated": ["q", "v"]}
NORMS = {"gpt2": ["ln_1", "ln_2", "ln_f"], "t5-gated": ["layer_norm", "final_layer_norm"]}
KEYS = {"gpt2": ["c_attn"], "t5-gated": ["k", "v"]}
INNER = {"gpt2": ["mlp.c_proj"], "t5-gated": ["wo"]}


def theirs(family: str) -> dict[str, "peft.PeftConfig"]:
    task = "SEQ_2_SEQ_LM" if family.startswith("t5") else "CAUSAL_LM"
    some = QUERY_VALUE.get(family, ["q_proj", "v_proj"])
    keys, inner = KEYS.get(family, ["k_proj", "v_proj"]), INNER.get(family, ["down_proj"])
    return {
        "lora": peft.LoraConfig(task_type=task, r=3, target_modules="all-linear"),
        "rslora": peft.LoraConfig(task_type=task, r=3, target_modules=some, use_rslora=True),
        "dora": peft.LoraConfig(task_type=task, r=3, target_modules=some, use_dora=True, lora_dropout=0.1),
        "patterns": peft.LoraConfig(
            task_type=task, r=3, target_modules=some, rank_pattern={some[0]: 2}, alpha_pattern={"never": 1},
            layers_to_transform=[1],
        ),
        "regex": peft.LoraConfig(task_type=task, r=2, target_modules=rf".*\.(0|1)\..*\.{some[0]}"),
        "embeddings": peft.LoraConfig(task_type=task, r=2, target_modules=[*some, *EMBEDDINGS[family]]),
        "dora-embeddings": peft.LoraConfig(task_type=task, r=2, target_modules=EMBEDDINGS[family], use_dora=True),
        "tied-head": peft.LoraConfig(task_type=task, r=2, target_modules=[*EMBEDDINGS[family], "lm_head"]),
        "modules-to-save": peft.LoraConfig(task_type=task, r=2, target_modules=some, modules_to_save=["lm_head"]),
        "modules-by-bare-end": peft.LoraConfig(task_type=task, r=2, target_modules=some, modules_to_save=["m_head"]),
        "no-layers": peft.LoraConfig(task_type=task, r=2, target_modules=some, layers_to_transform=[]),
        "prompt": peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4),
        "prefix": peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=4),
        "prefix-network": peft.PrefixTuningConfig(
            task_type=task, num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=6
        ),
        "ia3": peft.IA3Config(task_type=task, target_modules=[*keys, *inner], feedforward_modules=inner),
        "layernorm": peft.LNTuningConfig(
            task_type=task,
            target_modules=NORMS.get(family, ["input_layernorm", "post_attention_layernorm", "norm"]),
        ),
    }  # fmt: skip


def inputs_for(base: BaseModel) -> dict[str, torch.Tensor]:
    top = base.embedding.weight.shape[0]
    ids = torch.randint(3, top, (2, 9))
    return {"input_ids": ids, "decoder_input_ids": torch.randint(3, top, (2, 5))}


@torch.no_grad()
def peft_logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor], encoder_decoder: bool) -> torch.Tensor:
    options = {"attention_mask": torch.ones_like(inputs["input_ids"])}
    if encoder_decoder:
        options["decoder_input_ids"] = inputs["decoder_input_ids"]
    logits = model(input_ids=inputs["input_ids"], **options).logits
    length = inputs["decoder_input_ids" if encoder_decoder else "input_ids"].shape[1]
    return logits[:, -length:].flatten(0, 1)


def plain_copy(base: BaseModel) -> torch.nn.Module:
    model = copy.deepcopy(base.model)
    model.set_attn_implementation("eager")
    return model


def in_double(base: BaseModel, model: torch.nn.Module) -> None:
    """Hold both in float64: random adapters on random bases multiply float32's rounding beyond the bound."""
    for module in (base.model, model):
        module.double()
    for parameter in parameters(base, "t").values():
        parameter.data = parameter.data.double()


def apart(ours: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a share of the largest logit of `other` where that is above 1."""
    return float((ours - other).abs().max()) / max(1.0, float(other.abs().max()))


BOUND = 1e-5  # some bases' norms round to float32 on the way
EFFECT = 1e-2  # less than this, and the adapter did nothing: then nothing was compared


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_opens_ours(family: str, kind: str, tmp_path: Path) -> None:
    base = tiny.make(family)
    inputs = inputs_for(base)
    ones = torch.ones_like(inputs["input_ids"])
    bare, plain = all_logits(base, inputs, ones), plain_copy(base)
    attach(base, "t", OURS[kind], seed=1)
    with torch.no_grad():
        for parameter in parameters(base, "t").values():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    base.use("t")
    save_tuning(base, "t", tmp_path)
    opened = peft.PeftModel.from_pretrained(plain, tmp_path)
    in_double(base, opened)
    ours, pefts = all_logits(base, inputs, ones), peft_logits(opened.eval(), inputs, base.encoder_decoder)
    assert (ours - bare).abs().max() > EFFECT
    assert apart(ours, pefts) <= BOUND


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", theirs("llama"))
@pytest.mark.parametrize("family", FAMILIES)
def test_we_open_pefts(family: str, kind: str, tmp_path: Path) -> None:
    base = tiny.make(family)
    inputs = inputs_for(base)
    ones = torch.ones_like(inputs["input_ids"])
    bare = all_logits(base, inputs, ones)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(plain_copy(base), theirs(family)[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path)
    load_tuning(base, tmp_path, "t")
    base.use("t")
    in_double(base, model)
    expected = peft_logits(model.eval(), inputs, base.encoder_decoder)
    ours = all_logits(base, inputs, ones)
    assert (ours - bare).abs().max() > EFFECT
    assert apart(ours, expected) <= BOUND


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("modules", [["mlp.up_proj"], ["mlp"], ["*.1.self_attn", "norm"]])
def test_what_is_saved_whole_has_no_product_beside_it(modules: list[str], tmp_path: Path) -> None:
    base, again = tiny.make("llama"), tiny.make("llama")
    inputs = inputs_for(base)
    ones = torch.ones_like(inputs["input_ids"])
    bare, plain = all_logits(base, inputs, ones), plain_copy(base)
    attach(base, "t", LoRA(rank=2, modules_to_save=modules), seed=1)
    with torch.no_grad():
        for parameter in parameters(base, "t").values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    base.use("t")
    save_tuning(base, "t", tmp_path)
    opened = peft.PeftModel.from_pretrained(plain, tmp_path)
    in_double(base, opened)
    ours = all_logits(base, inputs, ones)
    assert (ours - bare).abs().max() > EFFECT
    assert apart(ours, peft_logits(opened.eval(), inputs, False)) <= BOUND
    (tmp_path / "luthier.json").unlink()
    load_tuning(again, tmp_path, "t")
    again.use("t")
    in_double(again, opened)
    assert torch.equal(all_logits(again, inputs, ones), all_logits(base, inputs, ones))
