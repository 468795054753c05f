"""Building the kernels, and what happens where they cannot be built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.models.kernels import library

FOUND = library.library()
built = pytest.mark.skipif(isinstance(FOUND, str), reason=f"no kernels: {FOUND}")


@built
def test_without_leave_for_amx_the_others_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[bool] = []
    monkeypatch.setattr(library, "built", lambda compiler, units: asked_for.append(units) or Path(FOUND._name))
    for leave, switch in ((True, ""), (False, ""), (True, "avx512")):
        monkeypatch.setattr(library, "has_units", lambda leave=leave: leave)
        monkeypatch.setenv(library.SWITCH, switch)
        library.library.__wrapped__()
    assert asked_for == [True, False, False]


SAY = "from luthier.models.kernels.library import library; found = library(); print(found if isinstance(found, str) else 'built')"


def asked(cache: Path, **environment: str) -> subprocess.Popen:
    """What a process of its own says of the kernels."""
    given_ = {**os.environ, "LUTHIER_CACHE": str(cache), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, "-c", SAY], stdout=subprocess.PIPE, text=True, env=given_)


def said(process: subprocess.Popen) -> str:
    found = process.communicate(timeout=120)[0].strip()
    assert process.returncode == 0
    return found


@built
def test_where_they_cannot_be_built_it_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such option" >&2\nexit 1\n')
    broken.chmod(0o755)
    empty = tmp_path / "nothing"
    empty.mkdir()
    file = tmp_path / "file"
    file.write_text("")
    asks = [
        asked(tmp_path / "a", CC=str(broken)),
        asked(tmp_path / "b", PATH=str(empty), CC=""),
        asked(tmp_path / "c", LUTHIER_KERNELS="0"),
        asked(file),
    ]
    failed, missing, off, unwritable = map(said, asks)
    assert failed == "building them failed (no such option)"
    assert missing == "there is no C compiler"
    assert off == "LUTHIER_KERNELS is 0"
    assert unwritable.startswith("building them failed (The cache")


@built
def test_a_library_that_another_user_left_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(FOUND._name)
    assert library.load(path)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(OSError, match="belongs to another user"):
        library.load(path)


@built
def test_processes_that_build_them_at_once_all_have_them(tmp_path: Path) -> None:
    asks = [asked(tmp_path / "cache") for _ in range(3)]
    assert [said(one) for one in asks] == ["built"] * 3
    folders = [one for one in (tmp_path / "cache" / "kernels").iterdir() if not one.name.startswith(".")]
    assert len(folders) == 1 and (folders[0] / "kernels.so").is_file()
