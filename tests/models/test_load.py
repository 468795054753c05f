"""Finding a base by name, and what is said when it is not one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny

from luthier.errors import UserError
from luthier.models.base import T5_FAMILIES, BaseModel
from luthier.models.load import BaseSpec, how_stored, read_model, resolve_device, resolve_dtype
from luthier.models.stored import Stored


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    base = tiny.make("llama")
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_directory_is_a_base_in_either_precision(saved: Path, dtype: str) -> None:
    base = BaseModel.load(BaseSpec(model=str(saved), dtype=dtype, device="cpu"))
    assert base.dtype == getattr(torch, dtype)
    assert base.fingerprint() == tiny.make("llama").fingerprint(), "the fingerprint must not depend on the precision"
    assert base.fingerprint() != tiny.make("llama", seed=1).fingerprint()
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", tiny.DECODERS + tiny.UNPACKED + tiny.ENCODER_DECODERS + tiny.ABSOLUTE)
def test_weights_cast_one_by_one_are_those_that_transformers_casts(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Whole state, buffers that are not saved too, ties and configuration."""
    base = tiny.make(family)
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    spec = BaseSpec(model=str(tmp_path))
    ours, _ = read_model(spec, dtype)
    theirs = type(ours).from_pretrained(tmp_path, dtype=dtype)
    left = family == "gemma2" or (base.family in T5_FAMILIES and dtype == torch.float16)
    assert how_stored(spec, dtype) == Stored(torch.float32, one_by_one=not left)
    for found, expected in (
        (ours.state_dict(), theirs.state_dict()),
        (dict(ours.named_buffers()), dict(theirs.named_buffers())),
    ):
        assert found.keys() == expected.keys()
        for key, one in expected.items():
            assert found[key].dtype == one.dtype and torch.equal(found[key], one), key
    places = [[one.data_ptr() for one in model.state_dict().values()] for model in (ours, theirs)]
    assert len(set(places[0])) == len(set(places[1]))
    configs = [[one.config.to_dict() for one in model.modules() if hasattr(one, "config")] for model in (ours, theirs)]
    assert configs[0] == configs[1] and ours.dtype == theirs.dtype


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("stated", ["float32", "bfloat16", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_files_say_in_what_they_are_stored_not_the_configuration(
    dtype: torch.dtype, stated: str | None, shards: int, tmp_path: Path
) -> None:
    base = tiny.make("llama", dtype)
    base.model.save_pretrained(tmp_path, max_shard_size="1GB" if shards == 1 else "30kB")
    base.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model*.safetensors"))) >= shards
    told = json.loads((tmp_path / "config.json").read_text())
    told.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(told if stated is None else {**told, "dtype": stated}))
    spec = BaseSpec(model=str(tmp_path))
    assert how_stored(spec, torch.bfloat16) == Stored(dtype, one_by_one=dtype == torch.float32)
    for wanted in (torch.float32, torch.bfloat16):
        model, _ = read_model(spec, wanted)
        expected = base.model.state_dict()
        assert all(torch.equal(one, expected[key].to(wanted)) for key, one in model.state_dict().items())
        assert model.dtype == wanted


def test_auto_takes_what_this_machine_has() -> None:
    device = resolve_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_dtype("auto", device) in (torch.bfloat16, torch.float32)
    assert resolve_dtype("float32", device) is torch.float32
    with pytest.raises(UserError, match="device 'gpu' cannot be used"):
        resolve_device("gpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m-instrct", "Did you mean 'smollm2-135m-instruct'"),
        ("./nowhere", "Unknown base model './nowhere'"),
        ("nowhere.gguf", "nowhere.gguf does not exist"),
    ],
)
def test_a_name_that_is_nothing(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        BaseModel.load(BaseSpec(model=name))


def test_broken_directories_are_explained(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be read from the directory"):
        BaseModel.load(BaseSpec(model=str(tmp_path)))
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="could not be read from the directory"):
        BaseModel.load(BaseSpec(model=str(tmp_path)))
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")  # pickled weights are never opened
    with pytest.raises(UserError, match="could not be read from the directory"):
        BaseModel.load(BaseSpec(model=str(tmp_path)))
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(UserError, match="could not be read from the GGUF file"):
        BaseModel.load(BaseSpec(model=str(tmp_path / "junk.gguf")))


@pytest.mark.parametrize(
    "broken",
    [
        {"model.safetensors.index.json": "[]"},
        {"model.safetensors.index.json": "{"},
        {"model.safetensors.index.json": '{"weight_map": {}}'},
        {"model.safetensors.index.json": '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'},
        {"model.safetensors": ""},
        {"model.safetensors": "\x08\0\0\0\0\0\0\0{}      "},
        {"config.json": '{"model_type": "llama", "dtype": "float33"}'},
    ],
    ids=["list", "cut", "empty", "missing shard", "no bytes", "no weights", "unknown precision"],
)
def test_files_of_weights_that_are_wrong_are_one_message(saved: Path, tmp_path: Path, broken: dict[str, str]) -> None:
    for file in saved.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    for name, text in broken.items():
        (tmp_path / name).write_bytes(text.encode())
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(UserError, match="could not be read from the directory"):
            BaseModel.load(BaseSpec(model=str(tmp_path), dtype=dtype))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_files_lack_are_not_drawn_at_random(saved: Path, tmp_path: Path, dtype: str) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(saved / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"its files lack 1 of its weights \({lost}\)"):
        BaseModel.load(BaseSpec(model=str(tmp_path), dtype=dtype))  # type: ignore[arg-type]


def test_t5_refuses_float16(tmp_path: Path) -> None:
    base = tiny.make("t5")
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "t5"
    with pytest.raises(UserError, match="T5 overflows in float16"):
        BaseModel.load(BaseSpec(model=str(tmp_path), dtype="float16"))
