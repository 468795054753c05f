"""Adapters that PEFT wrote give PEFT's logits here, on four bases; written again they are PEFT's files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.logits import all_logits
from tests.merged import merged_copy
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from luthier.models.base import BaseModel
from luthier.tuning.files import load_tuning, save_tuning

# PEFT pads and sums in another order, which shows where logits reach 25.
TOLERANCE = {"llama": 1e-5, "llama_gqa": 1e-5, "t5": 1e-5, "t5_v1_1": 1e-4}
BASES = list(TOLERANCE)
KINDS = [
    *("lora", "lora_rslora", "lora_dora", "lora_patterns", "lora_modules_to_save", "ia3", "ln_tuning"),
    *("prompt_tuning", "prefix_tuning", "prefix_tuning_projection"),
]
MASKS = ["attention_mask_all", "attention_mask_padded"]


def load_base(gold: Path, name: str) -> BaseModel:
    kind = AutoModelForSeq2SeqLM if name.startswith("t5") else AutoModelForCausalLM
    model = kind.from_pretrained(gold / name / "base", dtype=torch.float32)
    return BaseModel(model, tiny.unigram() if name.startswith("t5") else tiny.byte_bpe())


def expected_logits(logits: torch.Tensor, inputs: dict[str, torch.Tensor], name: str, mask: str) -> torch.Tensor:
    if name.startswith("t5"):
        return logits.flatten(0, 1)
    width = inputs["input_ids"].shape[1]
    return logits[:, -width:][inputs[mask].bool()]  # without the virtual tokens' own positions


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", BASES)
def test_a_bare_bases_logits_equal_transformers(shared: Path, name: str, mask: str) -> None:
    gold = shared / "gold" / "peft"
    inputs = load_file(gold / name / "inputs.safetensors")
    found = load_file(gold / name / "base_logits.safetensors")["logits" if mask == MASKS[0] else "logits_padded"]
    expected = expected_logits(found, inputs, name, mask)
    found = all_logits(load_base(gold, name), inputs, inputs[mask])
    torch.testing.assert_close(found, expected, atol=TOLERANCE[name], rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BASES)
def test_logits_equal_pefts(shared: Path, name: str, kind: str) -> None:
    gold = shared / "gold" / "peft"
    folder = gold / name / kind
    if not folder.is_dir():
        pytest.skip(f"{name} has no {kind}: its head is tied")
    base = load_base(gold, name)
    load_tuning(base, folder, "t")
    base.use("t")
    inputs, logits = load_file(gold / name / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    for mask, key in zip(MASKS, ("logits", "logits_padded"), strict=True):
        expected = expected_logits(logits[key], inputs, name, mask)
        torch.testing.assert_close(all_logits(base, inputs, inputs[mask]), expected, atol=TOLERANCE[name], rtol=0)
    if base.methods["t"].laws.merge.holds:
        expected = expected_logits(logits["merged_logits"], inputs, name, MASKS[0])
        merged = all_logits(merged_copy(base, "t"), inputs, inputs[MASKS[0]])
        torch.testing.assert_close(merged, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BASES)
def test_written_again_it_is_pefts_file(shared: Path, tmp_path: Path, name: str, kind: str) -> None:
    folder = shared / "gold" / "peft" / name / kind
    if not folder.is_dir():
        pytest.skip(f"{name} has no {kind}: its head is tied")
    base = load_base(shared / "gold" / "peft", name)
    load_tuning(base, folder, "t")
    save_tuning(base, "t", tmp_path)
    ours, theirs = load_file(tmp_path / "adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
    assert {key: one.shape for key, one in ours.items()} == {key: one.shape for key, one in theirs.items()}
    for key, tensor in theirs.items():
        if base.encoder_decoder and kind.startswith("prefix"):  # a pair that no layer reads is not kept
            tensor[:, tensor.shape[1] // 2 :] = 0
        if base.encoder_decoder and kind == "prompt_tuning":  # the second half is never read
            tensor[8:] = tensor[:8]
        assert torch.equal(ours[key], tensor)
    said, config = (json.loads((one / "adapter_config.json").read_text()) for one in (tmp_path, folder))
    same = {"peft_type", "task_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
    same |= {"num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"}
    assert {key: said[key] for key in same & said.keys()} == {key: config[key] for key in same & said.keys()}
