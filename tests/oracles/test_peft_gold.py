"""Adapters that PEFT wrote give PEFT's logits here, on four bases."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from luthier.models.base import BaseModel
from luthier.models.batch import Batch, Packed
from luthier.tuning import LoRA, Method, PromptTuning, attach, parameters
from luthier.tuning.files import copy_into

BASES = ["llama", "llama_gqa", "t5", "t5_v1_1"]


def load(folder: Path, name: str) -> BaseModel:
    kind = AutoModelForSeq2SeqLM if name.startswith("t5") else AutoModelForCausalLM
    model = kind.from_pretrained(folder / name / "base", dtype=torch.float32)
    return BaseModel(model, tiny.unigram() if name.startswith("t5") else tiny.byte_bpe())


def all_logits(base: BaseModel, inputs: dict[str, torch.Tensor], mask: str) -> torch.Tensor:
    """Logits at every position, rows cut to their mask and run packed: (real tokens, vocabulary)."""
    ids, kept = inputs["input_ids"], inputs[mask].bool()
    source = Packed(ids[kept], tuple(kept.sum(1).tolist()))
    if base.encoder_decoder:
        decoder = inputs["decoder_input_ids"]
        length = decoder.shape[1]
        count = decoder.numel()
        packed = Packed(decoder.flatten(), (length,) * len(decoder))
        owners = torch.arange(len(decoder)).repeat_interleave(length)
        batch = Batch(("a", "b"), source, torch.arange(count), decoder.flatten(), owners, packed, (0, 1))
    else:
        count = len(source.ids)
        owners = torch.arange(2).repeat_interleave(torch.tensor(source.lengths))
        batch = Batch(("a", "b"), source, torch.arange(count), source.ids, owners)
    with torch.no_grad():
        return base.logits(base.target_states(batch))


def expected_logits(
    tensors: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor], name: str, mask: str
) -> torch.Tensor:
    logits = tensors["logits" if mask == "attention_mask_all" else "logits_padded"]
    if name.startswith("t5"):
        return logits.flatten(0, 1)
    width = inputs["input_ids"].shape[1]
    return logits[:, -width:][inputs[mask].bool()]  # without the virtual tokens' own positions


def method_of(config: dict) -> Method:
    if config["peft_type"] == "PROMPT_TUNING":
        return PromptTuning(length=config["num_virtual_tokens"], init="random")
    return LoRA(rank=config["r"], alpha=config["lora_alpha"], targets=config["target_modules"])


@pytest.mark.parametrize("mask", ["attention_mask_all", "attention_mask_padded"])
@pytest.mark.parametrize("kind", [None, "lora", "prompt_tuning"])
@pytest.mark.parametrize("name", BASES)
def test_logits_equal_pefts(shared: Path, name: str, kind: str | None, mask: str) -> None:
    gold = shared / "gold" / "peft"
    base = load(gold, name)
    inputs = load_file(gold / name / "inputs.safetensors")
    if kind:
        config = json.loads((gold / name / kind / "adapter_config.json").read_text())
        method = method_of(config)
        attach(base, "t", method)
        tensors = method.from_file(base, load_file(gold / name / kind / "adapter_model.safetensors"))
        copy_into(parameters(base, "t"), tensors, kind)
        base.use("t")
        ours = method.peft_config(base, "t")
        assert all(ours[key] == config[key] for key in ("peft_type", "task_type"))
        saved = method.to_file(base, {key: one.detach() for key, one in parameters(base, "t").items()})
        theirs = load_file(gold / name / kind / "adapter_model.safetensors")
        assert saved.keys() == theirs.keys()
        assert {key: one.shape for key, one in saved.items()} == {key: one.shape for key, one in theirs.items()}
    file = gold / name / kind / "expected.safetensors" if kind else gold / name / "base_logits.safetensors"
    expected = expected_logits(load_file(file), inputs, name, mask)
    torch.testing.assert_close(all_logits(base, inputs, mask), expected, atol=2e-5, rtol=1e-4)
