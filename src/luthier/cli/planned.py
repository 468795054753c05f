"""A plan at the terminal: a table of bytes by part and phase, and what follows from it."""

from rich.console import Console
from rich.table import Table

from luthier.plan import PARTS, TuningPlan
from luthier.report.table import size


def print_plan(name: str, plan: TuningPlan, console: Console) -> None:
    """One tuning: the table, whether it fits, time and disk, and what would lower the peak."""
    table = Table(title=f"{name} ({plan.method})", title_justify="left", title_style="bold", box=None)
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase, justify="right", style="bold" if phase == plan.phase else "")
    for part in PARTS:
        held = [parts[part] for parts in plan.phases.values()]
        if any(held):
            table.add_row(part, *(size(count) if count else "" for count in held))
    table.add_row("in all", *(size(sum(parts.values())) for parts in plan.phases.values()), style="bold")
    console.print(table)
    verdict = "fits" if plan.fits else "[red]does not fit[/red]"
    console.print(f"peak {size(plan.peak_bytes)} in {plan.phase}, {size(plan.available_bytes)} free: {verdict}")
    if plan.rows:
        console.print(f"training computes {plan.seconds:,.0f} s of matrix products here, all else comes on top")
        console.print(f"lengths are those of {plan.rows}")
    if plan.file_bytes:
        console.print(f"a saved tuning takes {size(plan.file_bytes)}")
    for choice in plan.choices:
        fits = ", which fits" if choice.peak_bytes <= plan.available_bytes else ""
        console.print(f"  --set {choice.change}: peak {size(choice.peak_bytes)}{fits}", soft_wrap=True)
    if not plan.fits and not plan.choices:
        console.print("  No setting lowers it: take a smaller base.")
    console.print()
