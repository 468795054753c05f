"""Prompt templates: list them, render one on a row."""

import json
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.app import app, console
from luthier.errors import UserError

templates_app = typer.Typer(no_args_is_help=True, help="Prompt templates: list them, render one on a row.")
app.add_typer(templates_app, name="templates")


@templates_app.command("list")
def list_templates(
    file: Annotated[
        str | None, typer.Argument(help="A templates.yaml or a shipped collection; default: all shipped.")
    ] = None,
) -> None:
    """Name the templates of a file, or those that ship with Luthier."""
    from luthier.data.formats.promptsource import read_templates
    from luthier.data.library import template_files

    files = template_files() if file is None else {file: _template_file(file)}
    for name, path in files.items():
        print(f"{name}:")
        for entry in read_templates(path).values():
            print(f"  {entry.name}")


@templates_app.command("render")
def render_template(
    file: Annotated[str, typer.Argument(help="A templates.yaml (promptsource's format) or a shipped collection.")],
    name: Annotated[str, typer.Argument(help="The template's name.")],
    row: Annotated[Path, typer.Option(help="A JSON file with the row: column names and values.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print {parts, answer_choices} as JSON.")] = False,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut each expression to 2,048 characters.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of what `choice` and `random` draw.")] = 0,
) -> None:
    """Render one template of a file on one row."""
    from luthier.data.formats.promptsource import find_template
    from luthier.data.worker import RenderWorker

    try:
        values = json.loads(row.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"The row {row} could not be read as JSON: {error}.") from None
    if not isinstance(values, dict):
        raise UserError(f"The row {row} holds a {type(values).__name__}; it must be an object with named columns.")
    entry = find_template(_template_file(file), name)
    with RenderWorker() as worker:
        parts, choices = worker.parts(entry.template, values, str(row), seed=seed, truncate=truncate)
    if as_json:
        print(json.dumps({"parts": parts, "answer_choices": choices}, ensure_ascii=False))
        return
    for title, part in zip(
        ["prompt", "completion", *(f"part {n}" for n in range(3, len(parts) + 1))], parts, strict=False
    ):
        console.rule(title)
        print(part)
    if choices is not None:
        console.rule("answer choices")
        print("\n".join(choices))


def _template_file(file: str) -> Path:
    from luthier.data.library import template_files

    return template_files().get(file, Path(file))
