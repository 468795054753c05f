"""A saved tuning that is damaged or belongs elsewhere is refused, every bad key at once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.laws.test_methods import batch_of, disturb, make_rows, scores

from luthier.errors import UserError
from luthier.models.batch import Segment
from luthier.models.loss import label_scores
from luthier.tuning import LoRA, PrefixTuning, PromptTuning, attach, detach, parameters
from luthier.tuning.files import load_tuning, save_tuning


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tiny.make("llama")
    attach(base, "t", LoRA(rank=2))
    save_tuning(base, "t", tmp_path)
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


def test_settings_of_another_version_are_named(folder: Path) -> None:
    card = json.loads((folder / "luthier.json").read_text())
    card["settings"] |= {"colour": "blue", "rank": "two"}
    (folder / "luthier.json").write_text(json.dumps(card))
    said = refused(folder, "holds settings that LoRA does not have")
    assert "colour" in said and "rank" in said


@pytest.mark.parametrize("with_card", [True, False])
def test_pickled_weights_are_refused(folder: Path, with_card: bool) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": torch.ones(2)}, folder / "adapter_model.bin")
    if not with_card:
        (folder / "luthier.json").unlink()
    assert "pickled weights can run any code" in refused(folder, "adapter_model.bin")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, r"is of the type 'LOHA'; Luthier reads IA3, LN_TUNING, LORA, PREFIX_TUNING, PROMPT_TU"),
        ({"task_type": "SEQ_2_SEQ_LM"}, r"is for SEQ_2_SEQ_LM; this llama base is CAUSAL_LM"),
        ({"bias": "all", "use_qalora": True}, r"uses what Luthier does not have: bias: 'all', use_qalora: True"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights 'pissa' changed the base's own weights"),
        ({"target_modules": ["nowhere"]}, r"target_modules \['nowhere'\] means no module of this llama model"),
        ({"r": None}, r"adapter_config.json is damaged"),
        ({"r": 3}, r"lora_A.weight has shape \(2, 32\), not \(3, 32\);.*;.*has shape"),
        ({"target_modules": ["q_proj"]}, r"unexpected model.layers.0.mlp.down_proj.lora_A.weight; unexpected"),
    ],
)
def test_what_peft_saved_is_refused_by_name(folder: Path, changes: dict, message: str) -> None:
    (folder / "luthier.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    assert str(folder) in refused(folder, message)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", None),
        ("lora_alpha", "16"),
        ("r", 2.0),
        ("r", True),
        ("alpha_pattern", {"q_proj": "x"}),
        ("rank_pattern", [1]),
        ("modules_to_save", "lm_head"),
        ("target_modules", [1]),
        ("layers_to_transform", "0"),
        ("num_virtual_tokens", 2.5),
    ],
)
def test_a_damaged_config_is_named_with_its_key(folder: Path, key: str, value: object) -> None:
    (folder / "luthier.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    if key == "num_virtual_tokens":
        config = {"peft_type": "PROMPT_TUNING"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    assert str(folder) in refused(folder, f"adapter_config.json is damaged: {key} is ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"method": "zero_shot"}}, "unknown method 'zero_shot'"),
        ({"settings": {"method": ["x"]}}, r"unknown method \['x'\]"),
        ({"settings": {}}, "unknown method None"),
        ({"settings": ["lora"]}, "is damaged: settings: "),
        ({"base": {"model": "m"}}, "is damaged: base.fingerprint: "),
        ({"base": None}, "is damaged: base: "),
    ],
)
def test_a_damaged_card_is_named_with_its_key(folder: Path, changes: dict, message: str) -> None:
    card = json.loads((folder / "luthier.json").read_text())
    (folder / "luthier.json").write_text(json.dumps(card | changes))
    assert str(folder) in refused(folder, f"luthier.json (names the )?{message}")


def test_a_cut_file_of_pefts_is_named(folder: Path) -> None:
    (folder / "luthier.json").unlink()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert str(weights) in refused(folder, "is damaged or no safetensors file")


def test_an_adapter_of_pefts_for_another_shape_of_base_is_refused(folder: Path) -> None:
    (folder / "luthier.json").unlink()
    said = refused(folder, "does not fit", tiny.make("qwen3", blocks=1))
    assert "unexpected model.layers.1.mlp.down_proj.lora_A.weight" in said
    (folder / "adapter_config.json").write_text("[1]")
    refused(folder, "adapter_config.json is damaged: it holds no named keys")


def test_a_prefix_of_pefts_for_other_heads_is_refused(tmp_path: Path) -> None:
    base = tiny.make("llama")
    attach(base, "t", PrefixTuning(length=2))
    save_tuning(base, "t", tmp_path)
    (tmp_path / "luthier.json").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    said = refused(tmp_path, "this base has")
    assert "has (layers, heads, width) (2, 4, 16); this base has (2, 2, 16)" in said


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("gpt2", "transformer.wpe"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
        ("opt", "model.decoder.embed_positions"),
    ],
)
def test_positions_are_embedded_for_all_rows_at_once(family: str, module: str) -> None:
    base = tiny.make(family)
    end = module.rpartition(".")[2]
    with pytest.raises(UserError, match="matches no module"):
        attach(base, "t", LoRA(rank=1, targets=end))
    if family == "opt":  # reads the mask too
        with pytest.raises(UserError, match="reads more than the numbers it looks up"):
            attach(base, "t", LoRA(rank=1, targets=module))
        return
    attach(base, "t", LoRA(rank=1, targets=module))  # as files of PEFT's may have it
    disturb(base, "t")
    rows = make_rows(base, 4)
    before = scores(base, rows)
    mixed = batch_of(base, rows, (Segment("t", 0, 2), Segment(None, 2, 4)))
    with pytest.raises(UserError, match=f"'t' changes {module}, which works for all rows"):
        label_scores(base, mixed)
    alone = label_scores(base, batch_of(base, rows, (Segment("t", 0, 4),)))[0]
    assert not torch.equal(alone, before)


def test_segments_name_attached_tunings_and_follow_one_another() -> None:
    base = tiny.make("llama")
    attach(base, "t", LoRA(rank=1))
    rows = make_rows(base, 4)
    with pytest.raises(UserError, match="No tuning named 'u' is attached"):
        label_scores(base, batch_of(base, rows, (Segment("t", 0, 2), Segment("u", 2, 4))))
    for spans in ([(2, 4), (0, 2)], [(0, 2), (3, 4)], [(0, 3), (2, 4)], [(1, 2), (2, 4)], [(0, 2), (2, 3)]):
        with pytest.raises(AssertionError, match=r"segment"):
            label_scores(base, batch_of(base, rows, tuple(Segment("t", *span) for span in spans)))


def test_every_bad_key_is_listed(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    keys = sorted(tensors)
    tensors["extra"] = torch.ones(2)
    del tensors[keys[0]]
    tensors[keys[3]] = torch.ones(5, 5)
    tensors[keys[4]] = torch.ones(5, 5)
    tensors[keys[5]] = tensors[keys[5]].to(torch.int8)
    save_file(tensors, weights)
    said = refused(folder, "does not fit")
    short = [key.removeprefix("base_model.model.") for key in keys]
    assert f"{short[5]} holds int8, no numbers to train" in said
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


@pytest.mark.parametrize("name", ["half", "type", "train", "keys", "update", "float", "t-x", "_modules"])
def test_names_may_be_words_of_the_module_classes(name: str) -> None:
    base = tiny.make("llama")
    attach(base, name, LoRA(rank=1))
    owned = parameters(base, name)
    assert len(owned) == 28 and "model.layers.0.mlp.up_proj.lora_A.weight" in owned
    base.use(name)
    detach(base, name)
    assert not base.grafts.names


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


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA(layers=[0, 99]), "has no block 99, but blocks 0 to 1, or -2 to -1"),
        (LoRA(layers=[-3]), "has no block -3"),
        (LoRA(layers=[]), "layers is empty"),
        (LoRA(targets="lm_head", layers=[0]), "No target stands in the blocks 0"),
        (PromptTuning(length=2, init="class_labels", labels=["yes", "no", "red"]), "3 labels for a length of 2"),
    ],
)
def test_what_would_be_dropped_silently_is_said(method: LoRA | PromptTuning, message: str) -> None:
    with pytest.raises(UserError, match=message):
        attach(tiny.make("llama"), "t", method)


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
