"""A finished run in use: answer with it, ship it, look inside."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from luthier.cli.app import RunFolder, app, console
from luthier.errors import UserError
from luthier.evaluation.limits import MAX_FLIPS, MAX_KL


@app.command()
def generate(
    run: RunFolder,
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
    beams: Annotated[int | None, typer.Option(help="Keep this many partial answers and take the best.")] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="With beams: what the length is raised to that divides an answer's worth.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Draw tokens; 0 is greedy. Default: the recipe's.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many tokens; 0: all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the tokens that reach this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of what is drawn.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Answer so many lines together; fewer take less memory.")
    ] = None,
) -> None:
    """Use it: answer texts with a saved tuning."""
    from luthier.files import write_whole
    from luthier.session import Session

    if (text is None) == (file is None):
        raise UserError("Give either a text or --file FILE.")
    texts: list[str | dict[str, Any]] = [text] if text is not None else _lines(file or Path())
    session = Session(run)
    asked: dict[str, Any] = {"beams": beams, "length_penalty": length_penalty, "temperature": temperature}
    asked |= {"top_k": top_k, "top_p": top_p, "seed": seed, "batch_size": batch_size}
    try:
        decoding = replace(session.recipe.decoding, **{key: value for key, value in asked.items() if value is not None})
    except ValueError as error:
        raise UserError(f"{str(error)[0].upper()}{str(error)[1:]}.") from None
    answers = session.generate(texts, tuning, task=task, raw=raw, max_new_tokens=max_new_tokens, decoding=decoding)
    if out:
        pairs = zip(texts, answers, strict=True)
        lines = [json.dumps({"text": one, "answer": said}, ensure_ascii=False) + "\n" for one, said in pairs]
        write_whole(out, "".join(lines).encode())
    else:
        print("\n".join(answers))


@app.command()
def merge(
    run: RunFolder,
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
    run: RunFolder,
    tuning: Annotated[str, typer.Option(help="A trained tuning of the run.")],
    neighbours: Annotated[int, typer.Option(min=1, help="Tokens shown beside each vector of a soft prompt.")] = 5,
    rows: Annotated[int, typer.Option(min=0, help="Held-out rows on which a soft prompt is scored; 0: none.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """What did it learn? A soft prompt in words, spectra of products, factors, or how far each block moved."""
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
