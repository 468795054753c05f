"""One recipe over several training seeds: a run for each, and one report of their means and spread."""

import shutil
from collections.abc import Callable
from pathlib import Path

from luthier.directory import RunDirectory
from luthier.errors import UserError
from luthier.job import run as run_once
from luthier.launched import launched
from luthier.recipe import BASELINE, Recipe
from luthier.report.compare import compared
from luthier.report.files import FILES, write_report
from luthier.report.runs import open_runs
from luthier.report.schema import Report
from luthier.tuning import Prompting


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    isolate: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run a recipe into `out`: of several `seeds` each into `out/seed-N`, and their report into `out` itself.

    What trains nothing is scored with the first seed alone. Raises as `luthier.job.run` does.
    """
    if not recipe.seeds:
        return run_once(recipe, out, resume=resume, isolate=isolate)
    if launched():
        raise UserError(
            "seeds: several processes run one seed at a time. Set `seed`, start a run for each, and compare them."
        )
    folder = Path(out)
    folders = {seed: folder / f"seed-{seed}" for seed in recipe.seeds}
    if folder.exists() and (not folder.is_dir() or {one.name for one in folder.iterdir()} - {*FILES, *_names(folders)}):
        raise UserError(
            f"{folder} exists and holds something else than runs of these seeds. Give another one with --out."
        )
    if not resume and any(path.exists() for path in folders.values()):
        raise UserError(
            f"The run directory {folder} already exists. Continue it with --resume, give another one with --out, or remove it."
        )
    first = RunDirectory(folders[recipe.seeds[0]])
    for seed, path in folders.items():
        say(f"seed {seed}")
        own = recipe.model_copy(update={"seeds": [], "training_seed": seed})
        if path != first.path and not path.exists():
            _lend(first, RunDirectory.create(path, own, resume=False), recipe)
        run_once(own, path, resume=path.exists(), isolate=isolate)
    report = compared(open_runs(list(folders.values())))
    write_report(folder, report)
    return report


def _names(folders: dict[int, Path]) -> set[str]:
    return {path.name for path in folders.values()}


def _lend(first: RunDirectory, other: RunDirectory, recipe: Recipe) -> None:
    """Give another seed's run what no training seed changes: the scores of the base and of prompts, and their answers."""
    same = [BASELINE, *(name for name, one in recipe.tunings.items() if isinstance(one.method, Prompting))]
    for name in same:
        for found in [*first.path.glob(f"predictions/{name}.jsonl"), *first.path.glob(f"predictions/{name}.*.jsonl")]:
            _copy(found, other.path / "predictions" / found.name)
    for name in same:  # last: with its result a stage is done
        for found in first.path.glob(f"results/{name}.json"):
            _copy(found, other.path / "results" / found.name)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
