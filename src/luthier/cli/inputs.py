"""Is my data sound? The rows of a recipe, looked at and checked."""

import json
from typing import Annotated

import typer
from rich.markup import escape

from luthier.cli.app import Changes, RecipeFile, app, console, read_recipe


@app.command()
def preview(
    recipe: RecipeFile,
    rows: Annotated[int, typer.Option(min=1, help="How many training rows to show.")] = 3,
    set_: Changes = None,
) -> None:
    """Is my data sound? Show training rows as the model reads them, the trained tokens coloured."""
    from luthier.preview_rows import preview as preview_rows

    for row in preview_rows(read_recipe(recipe, set_), rows):
        cut = f", {row.cut} cut from its middle" if row.cut else ""
        trained = len(row.trained) + sum(len(pieces) for _, pieces in row.earlier)
        console.rule(f"{row.id}: prompt {row.prompt_tokens} tokens{cut}, trained {trained}")
        parts = [*row.earlier, (row.prompt, row.trained)]
        shown = "".join(f"[dim]{escape(text)}[/dim]{_marked(pieces)}" for text, pieces in parts)
        console.print(shown, soft_wrap=True)
    console.print("\n[dim]dim: prompt, read only[/dim]   [black on green]green: trained[/], token by token")


@app.command()
def audit(
    recipe: RecipeFile,
    set_: Changes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Is my data sound? Check every row; exit code 2 where a run would stop."""
    from dataclasses import asdict

    from luthier.audit_rows import audit as audit_rows
    from luthier.audit_rows import named, stop_on_errors

    found = audit_rows(read_recipe(recipe, set_))
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=2, ensure_ascii=False))
    for one in [] if as_json else found:
        console.print(f"[bold]{one.level}[/bold] {one.split}: {one.kind}: {one.count} rows ({escape(named(one))})")
        console.print(f"  {escape(one.advice)}")
        if one.example:
            console.print(f"  [dim]{escape(' '.join(one.example.split()))}[/dim]")
    if not found and not as_json:
        print("Nothing found: every row can be trained on and scored.")
    stop_on_errors(found)


def _marked(pieces: list[str]) -> str:
    return "".join(
        f"[black on {'green' if place % 2 else 'bright_green'}]{escape(_visible(piece))}[/]"
        for place, piece in enumerate(pieces)
    )


def _visible(piece: str) -> str:
    return piece.replace("\n", "\u23ce\n")
