"""report.md: the page's answer and tables as Markdown, for papers and pull requests."""

import re

from luthier.report.cells import Cell, Table
from luthier.report.cost_tables import (
    audit_table,
    disk_table,
    inference_table,
    mismatches_table,
    mixture_tables,
    runs_table,
    settings_table,
    templates_table,
)
from luthier.report.figures import base_name, unscaled
from luthier.report.parts import parts
from luthier.report.schema import Report
from luthier.report.score_tables import (
    forgetting_table,
    pairs_table,
    signatures_table,
    tasks_table,
    tunings_table,
)
from luthier.report.shots import break_even_table, shots_table
from luthier.report.tradeoff import matched_table, matched_words

REQUEST_NOTE = (
    "One at a time, the test prompt of middle length, 17 new tokens; merged: the tuning folded into the weights. "
    "The least of three, in the stage's process."
)


def markdown(report: Report) -> str:
    """The report's text and tables; a section without data is absent."""
    base = report.base
    bases = dict.fromkeys(base_name(one["model"]) for one in [base, *(run.base for run in report.runs)])
    text = [f"# {_plain(report.task)} on {_plain(', '.join(bases))}", _plain(report.answer)]
    if not report.runs:
        text.append(
            f"Base: {base['parameters']:,} parameters, {_plain(str(base['family']))}, {base['dtype']} on {base['device']}."
        )
    sections = [
        ("Runs", "", runs_table(report)),
        ("How the runs differ", "", mismatches_table(report)),
        *(
            section
            for name, part in parts(report)
            for section in (
                (_of("The tunings", name), f"Scores x100{unscaled(part)}, with 95 % intervals.", tunings_table(part)),
                (_of("Each task", name), "A star marks tasks that the tuning was trained on.", tasks_table(part)),
            )
        ),
        ("Pairs, on the same examples", "Paired bootstrap; Holm's correction over all of them.", pairs_table(report)),
        ("Forgetting", "Difference to the untouched base, with its 95 % interval.", forgetting_table(report)),
        *(
            ("What a score costs", f"{matched_words(part)}, the change against the base.", matched_table(part))
            for _, part in parts(report)
        ),
        *((f"The mixture of {name}", "", table) for name, table in mixture_tables(report).items()),
        *(
            (
                _of("Examples in the prompt", name),
                "Of several draws of the examples, the mean and its spread.",
                shots_table(part),
            )
            for name, part in parts(report)
        ),
        (
            "When a tuning pays for itself",
            "Against the best prompt with shots; a trained token counts as three read ones.",
            break_even_table(report),
        ),
        ("The prompts tried", "The best on validation answered the test.", templates_table(report)),
        ("What a request costs", REQUEST_NOTE, inference_table(report)),
        ("Disk for 1, 10, 100 tasks", "", disk_table(report)),
        ("Warnings about the data", "", audit_table(report)),
        ("Settings", "", settings_table(report)),
        ("How it was measured", "", signatures_table(report)),
    ]
    for title, note, table in sections:
        if table:
            text += [f"## {_plain(title)}", *([_plain(note)] if note else []), _table(table)]
    return "\n\n".join(text) + "\n"


def _of(title: str, name: str) -> str:
    return f"{title}: {name}" if name else title


def _table(table: Table) -> str:
    rows = [" | ".join(map(_plain, table.columns)), " | ".join(["---", *["---:"] * (len(table.columns) - 1)])]
    rows += [" | ".join(map(_cell, row)) for row in table.rows]
    return "\n".join(f"| {row} |" for row in rows)


def _cell(cell: Cell) -> str:
    return f"{_plain(cell.text)} ({_plain(cell.detail)})" if cell.detail else _plain(cell.text)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line; underscores inside words mean nothing there."""
    return re.sub(r"([\\`*{}\[\]<>#|~&]|\b_|_\b)", r"\\\1", " ".join(text.split()))
