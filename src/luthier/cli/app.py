"""The application that the commands join, and what they share."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from luthier.errors import Interrupted, UserError
from luthier.launched import WORD, Failure, Launched, launched

if TYPE_CHECKING:
    from luthier.recipe import Recipe

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Fit one language model to many tasks, and see the evidence for every choice.",
)
console = Console(highlight=False)

RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
RunFolder = Annotated[Path, typer.Argument(help="A run directory.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Change a setting: training.epochs=2. May be repeated.")
]


def read_recipe(path: Path, changes: list[str] | None) -> "Recipe":
    """The recipe in a file, changed as `--set` says."""
    from luthier.recipe_file import load_recipe

    # `data` on the command line is relative to where the command was given.
    placed = [
        f"data={Path(change.removeprefix('data=')).expanduser().absolute()}" if change.startswith("data=") else change
        for change in changes or []
    ]
    return load_recipe(path, placed)


def main() -> None:
    """Entry point: user errors end with one message and code 2, a stopped run with code 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars would break ours
    try:
        app()
    except UserError as error:
        _leave(2, f"error: {error}", Failure(2, str(error)))
    except KeyboardInterrupt:
        _leave(130, "stopped: nothing had begun.", Failure(3, "Nothing had begun."))
    except Interrupted as stop:
        _leave(130, f"stopped: {stop} Continue with --resume.", Failure(3, str(stop)))


def _leave(code: int, said: str, failure: Failure) -> NoReturn:
    """Say why and end; of several processes rank 0 says it, for all."""
    process: Launched | None = None
    told = False
    with suppress(UserError, RuntimeError):  # where the others cannot be reached, each says it itself
        process = launched()
        if process:
            where = f"Rank {process.rank}: " if process.rank else ""
            process.fail(Failure(failure.code, where + failure.message))
            told = bool(process.rank) and process.heard("said", within=WORD)
    if not told:
        print(said, file=sys.stderr, flush=True)
    with suppress(UserError, RuntimeError):
        if process:
            process.tell("said", True)
            process.part()
    sys.exit(code)
