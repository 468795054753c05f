"""The command line: parse, call, print."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from luthier.errors import Interrupted, UserError
from luthier.evaluation.limits import MAX_FLIPS, MAX_KL

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Fit one language model to many tasks, and see the evidence for every choice.",
)
console = Console(highlight=False)

RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Change a setting: training.epochs=2. May be repeated.")
]


@app.command()
def run(
    recipe: RecipeFile,
    out: Annotated[Path | None, typer.Option(help="The run directory; default: runs/<name of the recipe>.")] = None,
    set_: Changes = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped or killed.")] = False,
) -> None:
    """Is prompting enough, and if not, which tuning? Train, score and compare; writes report.html."""
    from luthier.job import run as run_recipe
    from luthier.report.table import print_report

    target = out or Path("runs") / recipe.stem
    report = run_recipe(_load(recipe, set_), target, resume=resume)
    print_report(report, console)
    console.print(f"report: {target / 'report.html'}   (numbers: {target / 'report.json'})")


@app.command()
def preview(
    recipe: RecipeFile,
    rows: Annotated[int, typer.Option(min=1, help="How many training rows to show.")] = 3,
    set_: Changes = None,
) -> None:
    """Is my data sound? Show training rows as the model reads them, the trained tokens coloured."""
    from luthier.preview_rows import preview as preview_rows

    for row in preview_rows(_load(recipe, set_), rows):
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

    found = audit_rows(_load(recipe, set_))
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


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    text: Annotated[str | None, typer.Argument(help="The text to answer.")] = None,
    tuning: Annotated[str | None, typer.Option(help="A tuning of the run; without it the base answers.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Answer each line: plain text, or JSON (a string, or an object with the template's names)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write JSON lines {text, answer} here.")] = None,
    task: Annotated[str | None, typer.Option(help="Of a mixture: the task whose template the text fills.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The text is the whole prompt; use no template.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; default: the task's.")] = None,
) -> None:
    """Use it: answer texts with a saved tuning."""
    from luthier.files import write_whole
    from luthier.session import Session

    if (text is None) == (file is None):
        raise UserError("Give either a text or --file FILE.")
    texts: list[str | dict[str, Any]] = [text] if text is not None else _lines(file or Path())
    answers = Session(run).generate(texts, tuning, task=task, raw=raw, max_new_tokens=max_new_tokens)
    if out:
        pairs = zip(texts, answers, strict=True)
        lines = [json.dumps({"text": one, "answer": said}, ensure_ascii=False) + "\n" for one, said in pairs]
        write_whole(out, "".join(lines).encode())
    else:
        print("\n".join(answers))


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    tuning: Annotated[str, typer.Option(help="A trained tuning of the run.")],
    out: Annotated[Path, typer.Option(help="The new folder of the merged model.")],
    onto: Annotated[
        str, typer.Option(help="On a 4-bit base: 16-bit, dequantized or requantized; best is the nearest of them.")
    ] = "best",
    dtype: Annotated[str | None, typer.Option(help="Precision to save in; default: the base's.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Held-out rows to compare on.")] = 50,
    max_kl: Annotated[float, typer.Option(min=0, help="Largest KL divergence, nats a token.")] = MAX_KL,
    max_flips: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of greedy tokens that flip.")
    ] = MAX_FLIPS,
    allow_drift: Annotated[bool, typer.Option("--allow-drift", help="Beyond the limits, warn and write.")] = False,
) -> None:
    """Ship it: write a tuning and its base as one transformers model, with a certificate of what that changed."""
    from luthier.merge_tuning import merge as merge_tuning
    from luthier.report.certificate import print_certificate

    certificate = merge_tuning(
        run, tuning, out, onto=onto, dtype=dtype, rows=rows, max_kl=max_kl, max_flips=max_flips,
        allow_drift=allow_drift, say=lambda text: console.print(f"{tuning}: {text}", markup=False),
    )  # fmt: skip
    print_certificate(certificate.to_json(), console)
    if not certificate.passed:
        print("warning: beyond the limits; written because of --allow-drift.", file=sys.stderr)
    console.print(f"model: {out}   (certificate: {out / 'certificate.json'})", soft_wrap=True)


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    tuning: Annotated[str, typer.Option(help="A trained tuning of the run.")],
    neighbours: Annotated[int, typer.Option(min=1, help="Tokens shown beside each vector of a soft prompt.")] = 5,
    rows: Annotated[int, typer.Option(min=0, help="Held-out rows on which a soft prompt is scored; 0: none.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """What did it learn? A soft prompt in words, LoRA's spectra, or how far each block moved."""
    from luthier.inspect_tuning import inspect as inspect_tuning
    from luthier.report.inspection import print_inspection

    tell = Console(stderr=True) if as_json else console
    found = inspect_tuning(
        run, tuning, neighbours=neighbours, rows=rows, say=lambda text: tell.print(f"{tuning}: {text}", markup=False)
    )
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    print_inspection(found, console)
    folder = run / "inspect"
    console.print(f"picture: {folder / f'{tuning}.svg'}   (numbers: {folder / f'{tuning}.json'})", soft_wrap=True)


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


def _load(path: Path, changes: list[str] | None):  # type: ignore[no-untyped-def]
    from luthier.recipe import load_recipe

    # `data` on the command line is relative to where the command was given.
    placed = [
        f"data={Path(change.removeprefix('data=')).expanduser().absolute()}" if change.startswith("data=") else change
        for change in changes or []
    ]
    return load_recipe(path, placed)


def _lines(path: Path) -> list[str | dict[str, Any]]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} could not be read: {error}.") from None
    texts: list[str | dict[str, Any]] = []
    for line in filter(str.strip, content.split("\n")):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = line
        texts.append(value if isinstance(value, (str, dict)) else line)
    if not texts:
        raise UserError(f"{path} holds no text.")
    return texts


def _marked(pieces: list[str]) -> str:
    return "".join(
        f"[black on {'green' if place % 2 else 'bright_green'}]{escape(_visible(piece))}[/]"
        for place, piece in enumerate(pieces)
    )


def _visible(piece: str) -> str:
    return piece.replace("\n", "\u23ce\n")


def main() -> None:
    """Entry point: user errors end with one message and code 2, a stopped run with code 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars would break ours
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: nothing had begun.", file=sys.stderr)
        sys.exit(130)
    except Interrupted as stop:
        print(f"stopped: {stop} Continue with --resume.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
