"""safetensors files written one tensor after another, against the library that defines the format."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from luthier.errors import UserError
from luthier.models.tensor_file import NAMES, write_tensors

TENSORS = {
    **{f"of {name}": torch.arange(6).reshape(2, 3).to(dtype) for dtype, name in NAMES.items()},
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "turned": torch.arange(12.0).reshape(3, 4).T,
    "trained": torch.nn.Parameter(torch.randn(5, dtype=torch.bfloat16)),
}


def test_the_library_reads_the_same_numbers(tmp_path: Path) -> None:
    write_tensors(tmp_path / "one.safetensors", TENSORS, {"format": "pt"})
    found = load_file(tmp_path / "one.safetensors")
    assert found.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    write_tensors(tmp_path / "one", TENSORS)
    write_tensors(tmp_path / "other", dict(reversed(TENSORS.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_a_full_disk_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "one"
    write_tensors(file, TENSORS)
    before = file.read_bytes()

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("luthier.files.os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_tensors(file, {"new": torch.ones(3)})
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_who_does_not_write_leaves_nothing(tmp_path: Path) -> None:
    write_tensors(tmp_path / "one", TENSORS, writes=False)
    assert not list(tmp_path.iterdir())
