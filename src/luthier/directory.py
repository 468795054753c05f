"""The run directory: where everything one recipe produced lies, and how whole files get there."""

import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from luthier.data.findings import Finding
from luthier.errors import UserError, nearest
from luthier.files import write_json, write_whole
from luthier.recipe import Recipe, file_part
from luthier.recipe_file import differing_key, make_recipe, recipe_yaml


class Answers:
    """A task's answers as they come, a JSON line each, so that scoring which is killed goes on where it stopped.

    Of several processes each writes a file of its own, `path` and `path.RANK`.
    """

    def __init__(self, path: Path, rank: int = 0):
        self.folder, self.first = path.parent, path.name
        self.path = path.with_name(f"{path.name}.{rank}") if rank else path

    def known(self) -> dict[int, str]:
        """The answers so far, of all processes, by the example's place; a line that a kill cut short is dropped."""
        found: dict[int, str] = {}
        for path in self._files():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                write_whole(path, whole)
            lines = [json.loads(line) for line in whole.decode().split("\n")[:-1]]
            found |= {int(one["place"]): str(one["prediction"]) for one in lines}
        return found

    def keep(self, found: Mapping[int, str]) -> None:
        """Add answers; they are on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"place": place, "prediction": text} for place, text in found.items()]
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def forget(self) -> None:
        """Remove the files: all is answered."""
        for path in self._files():
            path.unlink()

    def _files(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        numbered = re.compile(re.escape(self.first) + r"(\.\d+)?")
        return sorted(path for path in self.folder.iterdir() if numbered.fullmatch(path.name))


class RunDirectory:
    """Paths and state of one run; of several processes one `writes`."""

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes

    @classmethod
    def create(cls, path: Path, recipe: Recipe, resume: bool) -> "RunDirectory":
        """Make a new run directory, or take up an unfinished one of the same recipe.

        Raises UserError for a directory that exists without `resume`, for one of another recipe and for
        one that cannot be written.
        """
        directory = cls(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; give another folder with --out.")
        if path.is_dir() and any(path.iterdir()):
            if not (path / "recipe.yaml").is_file():
                raise UserError(f"The folder {path} exists and is no run. Give another one with --out.")
            if not resume:
                raise UserError(
                    f"The run directory {path} already exists. Continue it with --resume, give another one with "
                    "--out, or remove it."
                )
            saved = directory.recipe().model_dump(mode="json")
            if key := differing_key(saved, recipe.model_dump(mode="json")):
                raise UserError(
                    f"The run in {path} was started with another recipe: '{key}' differs. Give another folder "
                    "with --out, or resume with the same recipe."
                )
            return directory
        write_whole(path / "recipe.yaml", recipe_yaml(recipe).encode())
        write_json(path / "environment.json", environment())
        return directory

    @classmethod
    def open(cls, path: Path, writes: bool = True) -> "RunDirectory":
        """Open an existing run; raises UserError where there is none."""
        if not (path / "recipe.yaml").is_file():
            raise UserError(f"{path} is no run directory: it holds no recipe.yaml.")
        return cls(path, writes)

    def recipe(self) -> Recipe:
        """The resolved recipe of the run."""
        file = self.path / "recipe.yaml"
        return make_recipe(yaml.safe_load(file.read_text(encoding="utf-8")), where=str(file))

    def tuning(self, name: str) -> Path:
        """Folder of a saved tuning; raises UserError naming those that are there."""
        folder = self.path / "tunings" / name
        if not folder.is_dir():
            saved = sorted(path.name for path in (self.path / "tunings").glob("*"))
            raise UserError(f"The run {self.path} holds no tuning {name!r}. {nearest(name, saved)}")
        return folder

    def has_tuning(self, name: str) -> bool:
        """Whether a tuning of this name is saved."""
        return (self.path / "tunings" / name).is_dir()

    def checkpoints(self, name: str) -> Path:
        """Folder of a tuning's checkpoint while it trains."""
        return self.path / "checkpoints" / name

    def log(self, name: str) -> Path:
        """JSON lines of a tuning's steps and validations."""
        return self.path / "logs" / f"{name}.jsonl"

    def save_log(self, name: str, history: list[dict[str, Any]]) -> None:
        """Write the log anew from the history: a resumed training repeats no line."""
        if self.writes:
            write_whole(self.log(name), "".join(json.dumps(event) + "\n" for event in history).encode())

    @contextmanager
    def new_tuning(self, name: str) -> Iterator[Path]:
        """A folder for a tuning's files, which are there together afterwards, in the place of older ones, or not at all."""
        target = self.path / "tunings" / name
        partial = target.with_name(f".{name}.partial")
        if self.writes:
            shutil.rmtree(partial, ignore_errors=True)
        try:
            yield partial
        except BaseException:
            if self.writes:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.writes:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)

    def save_result(self, name: str, result: dict[str, Any]) -> None:
        """Write what a stage found; with this file the stage is done."""
        if self.writes:
            write_json(self.path / "results" / f"{name}.json", result)

    def result(self, name: str) -> dict[str, Any] | None:
        """What a stage found, None where it is not done."""
        file = self.path / "results" / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def answers_so_far(self, name: str, task: str, rank: int = 0) -> Answers:
        """The answers of a tuning to a task so far, where scoring was stopped; `rank` is who goes on."""
        return Answers(self._predictions(name, task).with_suffix(".partial"), rank)

    def save_predictions(self, name: str, task: str, lines: list[dict[str, Any]]) -> None:
        """Write every answer of a tuning to a task as JSON lines."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if self.writes:
            write_whole(self._predictions(name, task), text.encode())
            self.answers_so_far(name, task).forget()

    def answers(self, name: str) -> dict[str, list[dict[str, Any]]]:
        """The answers of a tuning (or of the baseline) to each of the run's tasks that has some, row by row."""
        recipe = self.recipe()
        files = {task.name: self._predictions(name, task.name) for task in (*recipe.tasks, *recipe.retention)}
        return {
            task: [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
            for task, file in files.items()
            if file.is_file()
        }

    def _predictions(self, name: str, task: str) -> Path:
        suffix = "" if task == self.recipe().task.name else f".{file_part(task)}"
        return self.path / "predictions" / f"{name}{suffix}.jsonl"

    def save_audit(self, findings: Sequence[Finding]) -> None:
        """Write what the audit found."""
        write_json(self.path / "audit.json", [asdict(one) for one in findings])

    def audit(self) -> list[dict[str, Any]]:
        """What the audit found before the run."""
        file = self.path / "audit.json"
        found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        return found

    def save_plan(self, plan: Mapping[str, Any]) -> None:
        """Write what each tuning was expected to cost."""
        write_json(self.path / "plan.json", plan)

    def plan(self, name: str) -> dict[str, Any] | None:
        """What a tuning was expected to cost; None where that is not known."""
        file = self.path / "plan.json"
        return json.loads(file.read_text(encoding="utf-8")).get(name) if file.is_file() else None

    def environment(self) -> dict[str, Any]:
        """What the run was started on."""
        found: dict[str, Any] = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))
        return found

    def forget_checkpoints(self) -> None:
        """Remove what only an unfinished run needs."""
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def remove(self) -> None:
        """Remove a run that never began."""
        shutil.rmtree(self.path, ignore_errors=True)

    def started(self) -> bool:
        """Whether anything worth keeping is there: a result or a checkpoint."""
        return any((self.path / "results").glob("*")) or any((self.path / "checkpoints").glob("*/*"))


def environment() -> dict[str, Any]:
    """What the run ran on: versions, processor, device."""
    import torch

    versions = {}
    named = ("luthier", "torch", "transformers", "safetensors", "bitsandbytes", "rouge-score", "sacrebleu", "numpy")
    for package in named:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
