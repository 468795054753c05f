"""Pages of mapped weights: let go they are the same numbers again; what was written into is left alone."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.models.base import BaseModel
from luthier.models.load import BaseSpec, read_model
from luthier.models.mapped import MappedFiles
from luthier.models.quantize import QuantizedLinear

MB = 1 << 20
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are let go on Linux")


def of_files() -> int:
    """Bytes of this process's memory that are pages of files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) * 1024


def mapped(folder: Path) -> dict[str, torch.Tensor]:
    weights = {"first": torch.randn(2 * MB), "second": torch.randn(2 * MB)}  # 8 MB each
    save_file(weights, folder / "weights.safetensors")
    found = load_file(folder / "weights.safetensors")
    assert all(torch.equal(found[key], weights[key]) for key in weights)  # reads every page
    return found


def test_pages_let_go_are_read_again(tmp_path: Path) -> None:
    found = mapped(tmp_path)
    before, first, second = of_files(), found["first"].clone(), found["second"].clone()
    MappedFiles().let_go(found["first"])
    assert before - of_files() >= 7 * MB
    assert torch.equal(found["first"], first) and torch.equal(found["second"], second)
    assert of_files() - before > -MB  # read again


def test_what_was_written_stays(tmp_path: Path) -> None:
    found, own = mapped(tmp_path), torch.full((MB,), 3.0)
    found["second"][5000] = 7.0
    files = MappedFiles()
    for tensor in (*found.values(), own):
        files.let_go(tensor)
    assert found["second"][5000] == 7.0 and bool((own == 3.0).all())


def test_a_base_packed_from_a_file_is_the_one_packed_in_memory(tmp_path: Path) -> None:
    """Each weight's pages are let go once it is packed: none before, and none that something else still needs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4
    )
    model, tokenizer = LlamaForCausalLM(config), tiny.byte_bpe()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    spec = BaseSpec(model=str(tmp_path), dtype="float32", quantize="nf4")
    read, made = BaseModel.load(spec, tiny.DEVICE), BaseModel(model, tokenizer, spec, tiny.DEVICE)
    assert read.fingerprint() == made.fingerprint()
    others = dict(made.model.named_modules())
    packed = {path: one for path, one in read.model.named_modules() if isinstance(one, QuantizedLinear)}
    assert len(packed) == 14
    assert all(torch.equal(one.dequantized(), others[path].dequantized()) for path, one in packed.items())
    kept, expected = dict(read.model.named_parameters()), dict(made.model.named_parameters())
    assert all(one.is_meta or torch.equal(one, expected[key]) for key, one in kept.items())


def test_a_base_cast_to_16_bits_is_never_in_memory_in_32_as_well(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)  # 164 MB
    tiny.make("llama").tokenizer.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    read_model(BaseSpec(model=str(tmp_path)), torch.bfloat16)  # what libraries load at their first use
    before = restarted_peak()
    model, _ = read_model(BaseSpec(model=str(tmp_path)), torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert size > 160 * MB and peak() - before < size // 2 + 24 * MB, "the copies, and one weight of 32 bits"


def peak() -> int:
    """The most memory this process held."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def restarted_peak() -> int:
    """Forget the peak, and return what is held now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the peak cannot be restarted here: {error}")
    return peak()
