"""What a tuning learnt, as terminal tables of 80 columns and as one SVG picture that stands alone."""

from collections.abc import Sequence
from html import escape
from typing import Any

from rich.console import Console
from rich.markup import escape as plain
from rich.table import Table

_STYLE = "<style>text{font:12px system-ui,sans-serif;fill:#222}.title{font-weight:600}</style>"
_LOW, _HIGH = (238, 243, 250), (18, 74, 140)  # colours of the smallest and largest value of a map


def print_inspection(found: dict[str, Any], console: Console) -> None:
    """Print the tables of what `inspect` found."""
    if prompt := found.get("prompt"):
        _print_prompt(prompt, console)
    if faithful := found.get("faithfulness"):
        _print_faithfulness(faithful, console)
    if spectra := found.get("spectra"):
        for title, rows in (("block", _by_block(spectra)), ("module", _by_kind(spectra))):
            console.print(_spectra_table(title, rows, spectra))
    if scalings := found.get("scalings"):
        console.print(_scalings_table(scalings))
    if layers := found.get("prefix"):
        console.print(_prefix_table(layers))
    if changes := found.get("changes"):
        table = Table(title="relative change ||W' - W|| / ||W||", title_justify="left")
        table.add_column("part")
        table.add_column("change", justify="right", no_wrap=True)
        table.add_column("most moved in it")
        table.add_column("", justify="right", no_wrap=True)
        for one in changes:
            most = one["most_moved"].removeprefix(f"{one['part']}.")
            table.add_row(one["part"], f"{one['relative']:.2%}", most, f"{one['most_relative']:.2%}")
        console.print(table)


def picture(found: dict[str, Any]) -> str:
    """One SVG: a map of blocks by modules for low-rank products, bars for everything else."""
    if spectra := found.get("spectra"):
        size = (
            ("||BA||", "norm", "{:.3f}") if spectra[0]["relative"] is None else ("||BA|| / ||W||", "relative", "{:.3f}")
        )
        maps = [
            size,
            ("effective rank", "effective_rank", "{:.1f}"),
            ("energy, share of the tuning's", "energy", "{:.2%}"),
        ]
        parts, height = [], 0
        for title, key, form in maps:
            body, tall = _map(spectra, title, key, form, height)
            parts.append(body)
            height += tall
        blocks = {one["block"] for one in spectra}
        return _svg(150 + 26 * len(blocks) + 20, height, f"{found['tuning']}: what its products add", "".join(parts))
    if prompt := found.get("prompt"):
        rows = [
            (f"{one['place']}: {one['neighbours'][0]['text']}", one["neighbours"][0]["cosine"])
            for one in prompt["tokens"]
        ]
        return _bars(f"{found['tuning']}: cosine to the nearest token", rows, prompt["chance_cosine"], "chance")
    if scalings := found.get("scalings"):
        rows = [(one["path"], one["change"]) for one in scalings]
        return _bars(f"{found['tuning']}: how far each module's factors are from 1", rows, None, "")
    if layers := found.get("prefix"):
        rows = [(f"{kind} {one['layer']}", one[f"{kind}_norm"]) for kind in ("key", "value") for one in layers]
        return _bars(f"{found['tuning']}: norms of the prefix's keys and values by layer", rows, None, "")
    rows = [(one["part"], one["relative"]) for one in found["changes"]]
    return _bars(f"{found['tuning']}: relative change of each part", rows, None, "")


def _print_prompt(prompt: dict[str, Any], console: Console) -> None:
    table = Table(title="nearest tokens of each vector, by cosine", title_justify="left")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("norm", justify="right", no_wrap=True)
    table.add_column("distance", justify="right", no_wrap=True)
    table.add_column("nearest (cosine), then the next")
    for one in prompt["tokens"]:
        near = one["neighbours"]
        words = [f"{_shown(near[0]['text'])} ({near[0]['cosine']:.2f})", *(_shown(other["text"]) for other in near[1:])]
        table.add_row(str(one["place"]), f"{one['norm']:.2f}", f"{near[0]['distance']:.2f}", plain("  ".join(words)))
    console.print(table)
    console.print(f"in words: {_shown(prompt['text'])}", markup=False)
    console.print(
        f"nearest cosine: mean {prompt['mean_cosine']:.3f}, of random vectors {prompt['chance_cosine']:.3f}",
        markup=False,
    )
    if prompt["group"] is not None:
        console.print(
            f"the tokens' mean cosine to each other: {prompt['group']:.3f}, of random tokens {prompt['chance_group']:.3f} "
            f"({prompt['chance_of_group']:.0%} of random groups are as close)",
            markup=False,
        )


def _print_faithfulness(faithful: dict[str, Any], console: Console) -> None:
    scores = faithful["scores"]
    table = Table(title=f"the task on {faithful['rows']} {faithful['split']} rows", title_justify="left")
    table.add_column("")
    for metric in scores["prompt"]:
        table.add_column(metric, justify="right")
    titles = {"prompt": "the soft prompt", "tokens": "its nearest tokens instead", "without": "neither"}
    for what, title in titles.items():
        values = [f"{value:.3f}" if key == "loss" else f"{value * 100:.1f}" for key, value in scores[what].items()]
        table.add_row(title, *values)
    console.print(table)
    if faithful["kept"] is None:
        console.print("The prompt lowers the loss on these rows by nothing, so there is no gain to keep.")
    else:
        console.print(f"faithfulness: the tokens keep {faithful['kept']:.0%} of what the prompt gains in loss.")


def _spectra_table(title: str, rows: dict[str, list[dict[str, Any]]], spectra: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"low-rank products by {title}, {len(spectra)} in all", title_justify="left")
    table.add_column(title)
    for column in ("||BA||", "/ ||W||", "eff. rank", "of", "energy"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, group in rows.items():
        mean = lambda key: sum(one[key] for one in group) / len(group)  # noqa: B023, E731
        relative = "-" if group[0]["relative"] is None else f"{mean('relative'):.4f}"
        energy = sum(one["energy"] for one in group)
        ranks = sorted({one["rank"] for one in group})
        table.add_row(
            name, f"{mean('norm'):.3f}", relative, f"{mean('effective_rank'):.2f}",
            "-".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))), f"{energy:.1%}",
        )  # fmt: skip
    return table


def _scalings_table(scalings: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="factors of the channels, 1 at the start", title_justify="left")
    table.add_column("module")
    for column in ("from 1 (rms)", "above 1", "least", "most"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in scalings:
        table.add_row(
            one["path"], f"{one['change']:.4f}", f"{one['amplified']:.0%}", f"{one['smallest']:.3f}", f"{one['largest']:.3f}"
        )  # fmt: skip
    return table


def _prefix_table(layers: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="mean norms in the prefix, beside those of random tokens", title_justify="left")
    table.add_column("layer", justify="right")
    for column in ("keys", "usual", "values", "usual", "values' cosine"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in layers:
        alike = "-" if one["alike"] is None else f"{one['alike']:.3f}"
        norms = [f"{one[key]:.2f}" for key in ("key_norm", "usual_key_norm", "value_norm", "usual_value_norm")]
        table.add_row(str(one["layer"]), *norms, alike)
    return table


def _by_block(spectra: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in spectra:
        groups.setdefault(_stack(one), []).append(one)
    return groups


def _by_kind(spectra: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in spectra:
        groups.setdefault(_kind(one), []).append(one)
    return groups


def _kind(one: dict[str, Any]) -> str:
    """A module's name without its block: with an encoder, that of its stack before it."""
    stack = one["path"].split(".")[0]
    return (
        f"{stack} {one['path'].rpartition('.')[2]}"
        if stack in ("encoder", "decoder")
        else one["path"].rpartition(".")[2]
    )


def _stack(one: dict[str, Any]) -> str:
    stack = one["path"].split(".")[0]
    number = "-" if one["block"] is None else str(one["block"])
    return f"{stack} {number}" if stack in ("encoder", "decoder") else number


def _map(spectra: Sequence[dict[str, Any]], title: str, key: str, form: str, top: int) -> tuple[str, int]:
    """A map with a row a module and a column a block, coloured from the smallest to the largest value."""
    kinds, blocks = (
        list(_by_kind(spectra)),
        sorted({one["block"] if one["block"] is not None else -1 for one in spectra}),
    )
    values = [one[key] for one in spectra]
    low, high = min(values), max(values)
    span = f"{form.format(low)} to {form.format(high)}"
    parts = [f'<text class="title" x="10" y="{top + 18}">{escape(title)} ({span})</text>']
    for row, kind in enumerate(kinds):
        parts.append(f'<text x="140" y="{top + 44 + 22 * row}" text-anchor="end">{escape(kind)}</text>')
    for one in spectra:
        x = 150 + 26 * blocks.index(one["block"] if one["block"] is not None else -1)
        y = top + 29 + 22 * kinds.index(_kind(one))
        share = (one[key] - low) / (high - low) if high > low else 0.0
        colour = "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(_LOW, _HIGH, strict=True))
        words = escape(f"{one['path']}: {form.format(one[key])}")
        parts.append(f'<rect x="{x}" y="{y}" width="24" height="20" fill="{colour}"><title>{words}</title></rect>')
    foot = top + 44 + 22 * len(kinds)
    for column, block in enumerate(blocks):
        label = "-" if block < 0 else block
        parts.append(f'<text x="{162 + 26 * column}" y="{foot}" text-anchor="middle">{label}</text>')
    return "".join(parts), 60 + 22 * len(kinds)


def _bars(title: str, rows: Sequence[tuple[str, float]], mark: float | None, what: str) -> str:
    top = max([value for _, value in rows] + [mark or 0.0]) or 1.0
    parts = [f'<text class="title" x="10" y="18">{escape(title)}</text>']
    for place, (label, value) in enumerate(rows):
        y, width = 30 + 22 * place, 300 * max(value, 0.0) / top
        parts.append(
            f'<text x="190" y="{y + 14}" text-anchor="end">{escape(_shown(label))}</text>'
            f'<rect x="200" y="{y}" width="{width:.1f}" height="17" fill="#124a8c"/>'
            f'<text x="{206 + width:.1f}" y="{y + 14}">{value:.3g}</text>'
        )
    height = 40 + 22 * len(rows)
    if mark is not None:
        x = 200 + 300 * mark / top
        parts.append(
            f'<path d="M{x:.1f} 26V{height - 8}" stroke="#c33" stroke-dasharray="4 3"/>'
            f'<text x="{x:.1f}" y="{height + 6}" text-anchor="middle">{escape(what)} {mark:.3g}</text>'
        )
    return _svg(560, height + 14, title, "".join(parts))


def _shown(text: str) -> str:
    """A token's text in one line: line breaks and other signs that no terminal shows are written out."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def _svg(width: int, height: int, title: str, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>{_STYLE}'
        f'<rect width="100%" height="100%" fill="#fff"/>{body}</svg>\n'
    )
