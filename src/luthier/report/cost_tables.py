"""What stands around the scores: disk for many tasks, the mixture, what the audit warned of, and runs compared."""

import yaml

from luthier.report.cells import NOTHING, Cell, Table, score_cell
from luthier.report.figures import base_name
from luthier.report.parts import base_of, bases
from luthier.report.schema import MixtureRow, Report
from luthier.report.table import count, size

DISK_TASKS = (1, 10, 100)
_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes a weight


def base_bytes(base: dict[str, object]) -> int:
    """Bytes of a base's weights as the run held them before any 4-bit packing: parameters times their width."""
    return int(str(base["parameters"])) * _WIDTHS.get(str(base["dtype"]), 4)


def disk_table(report: Report) -> Table:
    """Bytes of one base and a tuning for each of 1, 10 and 100 tasks, and of a merged model for each."""
    rows = []
    for name, tuning in report.tunings.items():
        if tuning.file_bytes:
            base = base_bytes(base_of(report, tuning))
            totals = [base + tuning.file_bytes * tasks for tasks in DISK_TASKS]
            rows.append((Cell(name, value=name), *(Cell(size(total), value=total) for total in totals)))
    for run, found in bases(report).items() if rows else ():
        label = "a merged model a task" + (f" ({run})" if len(report.runs) > 1 else "")
        totals = [base_bytes(found) * tasks for tasks in DISK_TASKS]
        rows.append((Cell(label, value=label), *(Cell(size(total), value=total) for total in totals)))
    heads = [f"{tasks} task{'s' if tasks > 1 else ''}" for tasks in DISK_TASKS]
    return Table("disk", ("base and a file a task", *heads), tuple(rows))


def inference_table(report: Report) -> Table:
    """What one request costs with each tuning, its additions beside the weights and folded into them."""
    rows = []
    for name, tuning in report.tunings.items():
        if (found := tuning.inference) is None:
            continue
        merged = [NOTHING, NOTHING]
        if found.merged is not None:
            merged = [_seconds(found.merged.first_token_seconds), _rate(found.merged.tokens_per_second)]
        rows.append(
            (
                Cell(name, value=name),
                Cell(f"{found.prompt_tokens:,}", value=found.prompt_tokens),
                _seconds(found.first_token_seconds),
                _rate(found.tokens_per_second),
                *merged,
                Cell(size(found.weights_bytes), value=found.weights_bytes),
            )
        )
    columns = (
        "tuning",
        "prompt tokens",
        "first token",
        "tokens/s",
        "first token, merged",
        "tokens/s, merged",
        "weights",
    )
    return Table("inference", columns, tuple(rows))


def _seconds(seconds: float) -> Cell:
    return Cell(f"{seconds * 1000:,.0f} ms" if seconds < 10 else f"{seconds:,.1f} s", value=seconds)


def _rate(tokens: float) -> Cell:
    return Cell(f"{tokens:,.1f}", value=tokens)


def templates_table(report: Report) -> Table:
    """What each template that was tried scored on validation; the best was taken."""
    rows = []
    for name, tuning in report.tunings.items():
        for task, tried in tuning.templates.items():
            metric = list(tuning.scores[task])[-1] if task in tuning.scores else report.metric
            for one in tried:
                chosen = Cell("chosen" if one.chosen else "")
                rows.append((Cell(name, value=name), Cell(task), Cell(one.name), score_cell(one, metric), chosen))
    return Table("templates", ("tuning", "task", "template", "on validation", ""), tuple(rows))


def mixture_tables(report: Report) -> dict[str, Table]:
    """By tuning: what its mixture was asked to be, and what was drawn."""
    columns = ("task", "form", "asked for", "got", "rows", "epochs", "tokens")
    return {
        name: Table(f"mixture-{place}", columns, tuple(_drawn(row) for row in tuning.mixture))
        for place, (name, tuning) in enumerate(report.tunings.items())
        if tuning.mixture
    }


def _drawn(row: MixtureRow) -> tuple[Cell, ...]:
    return (
        Cell(row.task),
        Cell(row.form),
        Cell(f"{row.asked:.2%}", value=row.asked),
        Cell(f"{row.got:.2%}", value=row.got),
        Cell(f"{row.rows:,}", value=row.rows) if row.rows is not None else Cell("streamed", value=""),
        Cell(f"{row.epochs:.2f}", value=row.epochs) if row.epochs is not None else NOTHING,
        Cell(f"{row.tokens:,}", value=row.tokens),
    )


def audit_table(report: Report) -> Table:
    """What the audit let pass with a warning."""
    rows = tuple(
        (
            Cell(one.kind),
            Cell(one.split),
            Cell(f"{one.count:,}", value=one.count),
            Cell(", ".join(one.rows[:3])),
            Cell(one.advice, wide=True),
        )
        for one in report.audit
    )
    return Table("audit", ("kind", "split", "rows", "first rows", "what it means"), rows)


def settings_table(report: Report) -> Table:
    """How each tuning was made: its method, what it was trained with, every setting that is not empty."""
    rows = tuple(
        (
            Cell(name, value=name),
            Cell(tuning.method),
            Cell(f"{tuning.learning_rate:g}", value=tuning.learning_rate) if tuning.learning_rate else NOTHING,
            Cell(f"{tuning.steps:,}", value=tuning.steps),
            Cell(f"{tuning.train_tokens:,}", value=tuning.train_tokens),
            Cell(_settings(tuning.settings) or "-", wide=True),
        )
        for name, tuning in report.tunings.items()
    )
    return Table("settings", ("tuning", "method", "learning rate", "steps", "tokens", "settings"), rows)


def _settings(settings: dict[str, object]) -> str:
    shown = {
        key: value for key, value in settings.items() if key != "method" and value not in (None, False, "", [], {})
    }
    inner = shown.pop("training", None)
    parts = [
        f"{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in shown.items()
    ]
    if isinstance(inner, dict):
        parts.append(f"training: {_settings(inner)}")
    return "; ".join(parts)


def runs_table(report: Report) -> Table:
    """The runs of a comparison."""
    rows = tuple(
        (
            Cell(run.name),
            Cell(", ".join(run.paths), wide=True),
            Cell(", ".join(map(str, run.seeds))),
            Cell(base_name(run.base["model"])),
            Cell(count(run.base["parameters"]), value=run.base["parameters"]),
            Cell(str(run.base["dtype"])),
        )
        for run in report.runs
    )
    return Table("runs", ("run", "folder", "seeds", "base", "parameters", "dtype"), rows)


def mismatches_table(report: Report) -> Table:
    """In what the runs of a comparison differ."""
    names = [run.name for run in report.runs]
    rows = tuple(
        (
            Cell(one.what),
            *(Cell(one.values.get(name, "-"), wide=len(one.values.get(name, "")) > 30) for name in names),
            Cell("compared" if one.comparable else "not compared"),
        )
        for one in report.mismatches
    )
    return Table("mismatches", ("differs", *names, "scores"), rows)


def settings_text(value: object) -> str:
    """A recipe or an environment as YAML."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
