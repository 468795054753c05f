"""A merge certificate as a terminal table of 80 columns."""

from typing import Any

from rich.console import Console
from rich.table import Table

from luthier.report.table import size


def print_certificate(certificate: dict[str, Any], console: Console) -> None:
    """Print what merging changed, a row a choice, the written one marked."""
    drifts = {name: choice["drift"] for name, choice in certificate["choices"].items()}
    first = next(iter(drifts.values()))
    table = Table(
        title=f"{certificate['tuning']}: merged ({certificate['dtype']}) against unmerged, "
        f"{first['tokens']} tokens of {certificate['rows']} {certificate['split']} rows",
        title_justify="left",
    )
    table.add_column("onto")
    for column in ("max logit diff", "KL, nats", "flips", "loss", "on disk"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("(unmerged)", "", "", "", f"{first['reference_loss']:.4f}", "")
    for name, found in drifts.items():
        table.add_row(
            f"{name} *" if name == certificate["chosen"] else name,
            f"{found['largest_logit_difference']:.3g}",
            f"{found['kl']:.2g}",
            f"{found['flips']:.2%}",
            f"{found['loss']:.4f}",
            size(certificate["choices"][name]["bytes"]),
        )
    console.print(table)
    limits = f"KL {certificate['max_kl']:g}, flips {certificate['max_flips']:.1%}"
    console.print(f"* written. {'Within' if certificate['passed'] else 'BEYOND'} the limits ({limits}).")
