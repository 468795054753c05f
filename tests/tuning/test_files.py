"""A saved tuning that is damaged or belongs elsewhere is refused, every bad key at once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny

from luthier.errors import UserError
from luthier.tuning import LoRA, PromptTuning, attach
from luthier.tuning.files import load_tuning, pack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tiny.make("llama")
    attach(base, "t", LoRA(rank=2))
    for file, content in pack(base, "t").items():
        (tmp_path / file).write_bytes(content)
    return tmp_path


def refused(folder: Path, message: str, base=None) -> str:
    base = base or tiny.make("llama")
    with pytest.raises(UserError, match=message) as caught:
        load_tuning(base, folder, "t")
    assert base.grafts.names == [], "a refused tuning must leave the base as it was"
    return str(caught.value)


def test_another_base_is_named(folder: Path) -> None:
    said = refused(folder, r"was trained on in-memory \(fingerprint \w{16}\); this base", tiny.make("llama", seed=3))
    assert tiny.make("llama").fingerprint()[:16] in said and tiny.make("llama", seed=3).fingerprint()[:16] in said
    assert tiny.make("qwen2").fingerprint()[:16] in refused(folder, "fingerprint", tiny.make("qwen2"))


def test_a_damaged_file_is_named(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:200], whole[: len(whole) - 8], b"\x80\x04pickle", b""):
        weights.write_bytes(content)
        assert str(weights) in refused(folder, "adapter_model.safetensors is damaged")
    weights.unlink()
    assert str(weights) in refused(folder, "is not there")
    (folder / "luthier.json").write_text("{")
    assert str(folder) in refused(folder, r"luthier.json is damaged")
    assert str(folder / "no") in refused(folder / "no", "holds no tuning")


def test_every_bad_key_is_listed(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    keys = sorted(tensors)
    tensors["extra"] = torch.ones(2)
    del tensors[keys[0]]
    tensors[keys[3]] = torch.ones(5, 5)
    tensors[keys[4]] = torch.ones(5, 5)
    save_file(tensors, weights)
    said = refused(folder, "does not fit")
    short = [key.removeprefix("base_model.model.") for key in keys]
    for words in (f"missing {short[0]}", "unexpected extra", f"{short[3]} has shape (5, 5)", f"{short[4]} has shape"):
        assert words in said


def test_an_unknown_method_is_named(folder: Path) -> None:
    card = json.loads((folder / "luthier.json").read_text())
    card["settings"]["method"] = "magic"
    (folder / "luthier.json").write_text(json.dumps(card))
    assert "luthier.json" in refused(folder, "unknown method 'magic'")


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a.b"])
def test_names_are_plain(name: str) -> None:
    with pytest.raises(UserError, match="may hold letters"):
        attach(tiny.make("llama"), name, LoRA())


def test_a_name_is_taken_once_and_a_failed_attach_leaves_no_trace() -> None:
    base = tiny.make("llama")
    tree = [path for path, _ in base.model.named_modules()]
    with pytest.raises(UserError, match=r"'q_porj' matches no module.*Did you mean 'q_proj'"):
        attach(base, "t", LoRA(targets=["v_proj", "q_porj"]))
    assert [path for path, _ in base.model.named_modules()] == tree
    attach(base, "t", PromptTuning(length=2))
    with pytest.raises(UserError, match="is attached already"):
        attach(base, "t", LoRA())
    with pytest.raises(UserError, match="do not fit a context of 512"):
        attach(base, "long", PromptTuning(length=512))


def test_prompt_tuning_starts_from_its_text() -> None:
    base = tiny.make("llama")
    text = "the guest asks"
    ids = base.tokenizer(text).input_ids
    attach(base, "t", PromptTuning(length=len(ids) + 2, init_text=text))
    vectors = base.grafts.prompts["t"]
    assert torch.equal(vectors, base.embedding.weight[torch.tensor([*ids, *ids[:2]])])
    assert vectors.dtype == torch.float32


def test_lora_patterns_choose_modules() -> None:
    from transformers.pytorch_utils import Conv1D

    from luthier.tuning.targets import match_modules

    base, kinds = tiny.make("llama"), (torch.nn.Linear, Conv1D)
    assert len(match_modules(base, "all-linear", kinds)) == 14
    assert sorted(match_modules(base, ["q_proj", "*.1.mlp.up_proj"], kinds)) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert list(match_modules(base, r"model\.layers\.0\..*_proj", kinds)) == [
        path for path in match_modules(base, "all-linear", kinds) if ".0." in path
    ]
    assert list(match_modules(base, "lm_head", kinds)) == ["lm_head"]
    assert len(match_modules(tiny.make("gpt2"), "all-linear", kinds)) == 8
