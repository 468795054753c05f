"""The main job, and what stands before it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.app import Changes, RecipeFile, app, console, read_recipe
from luthier.errors import UserError
from luthier.launched import launched


@app.command()
def run(
    recipe: RecipeFile,
    out: Annotated[Path | None, typer.Option(help="The run directory; default: runs/<name of the recipe>.")] = None,
    set_: Changes = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped or killed.")] = False,
) -> None:
    """Is prompting enough, and if not, which tuning? Train, score and compare; writes report.html."""
    from luthier.repeated import run as run_recipe
    from luthier.report.table import print_report

    target = out or Path("runs") / recipe.stem
    report = run_recipe(read_recipe(recipe, set_), target, resume=resume, say=console.print)
    if (process := launched()) and process.rank:
        return
    print_report(report, console)
    console.print(f"report: {target / 'report.html'}   (numbers: {target / 'report.json'})", soft_wrap=True)


@app.command()
def plan(
    recipe: RecipeFile,
    set_: Changes = None,
    memory: Annotated[
        float | None, typer.Option(min=0, help="Memory in GB to fit into; default: what is free.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """What will it cost? Memory by part, time and disk of each tuning, before anything is loaded."""
    from dataclasses import asdict

    from luthier.cli.planned import print_plan
    from luthier.plan import plan as make_plan

    found = make_plan(read_recipe(recipe, set_), None if memory is None else int(memory * 1e9))
    if as_json:
        print(json.dumps({name: asdict(one) for name, one in found.items()}, indent=2))
        return
    for name, one in found.items():
        print_plan(name, one, console)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Finished run directories.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html, .md, .csv and .json.")] = Path("runs/compare"),
) -> None:
    """Which run? Compare the tunings of several runs: other bases, settings, or seeds of one recipe."""
    from luthier.report.compare import compare_runs
    from luthier.report.table import print_report

    print_report(compare_runs(runs, out), console)
    console.print(f"report: {out / 'report.html'}   (numbers: {out / 'report.json'})", soft_wrap=True)


@app.command()
def schema(
    what: Annotated[str, typer.Argument(help="recipe or report.")] = "recipe",
) -> None:
    """Print the JSON schema of a recipe (for editors) or of report.json."""
    from luthier.recipe_schema import recipe_schema
    from luthier.report.schema import report_schema

    if what not in ("recipe", "report"):
        raise UserError(f"There is no schema of {what!r}. Allowed: recipe, report.")
    print(json.dumps(recipe_schema() if what == "recipe" else report_schema(), indent=2))
