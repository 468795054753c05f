"""The comparison as a terminal table, at 80 columns and wider."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from luthier.metrics import reading
from luthier.report.figures import figure, unscaled
from luthier.report.parts import parts
from luthier.report.schema import Report, Retention, Score, TuningReport

_SHORT = {
    "rouge1": "R-1", "rouge2": "R-2", "rougeL": "R-L", "rougeLsum": "R-Lsum", "rougeL_caption": "ROUGE_L", "bleu": "BLEU",
    "bleu_lc": "BLEU lc", "chrf": "chrF", "chrf++": "chrF++", "nist": "NIST", "meteor": "METEOR", "cider": "CIDEr",
    "macro_f1": "macro F1", "token_f1": "F1", "exact_match": "EM", "squad_exact_match": "EM", "matthews": "MCC",
}  # fmt: skip

_TASKS_BESIDE = 4  # columns of a table of 80 characters


def print_report(report: Report, console: Console) -> None:
    """Print the answer, the scores, the costs and what was forgotten."""
    console.print(f"\n[bold]{escape(report.answer)}[/bold]\n")
    for one in report.mismatches:
        if not one.comparable:
            told = "; ".join(f"{name}: {value}" for name, value in one.values.items())
            console.print(f"[bold]not compared[/bold]: {escape(one.what)} differs ({escape(told)})")
    if informing := [one.what for one in report.mismatches if one.comparable]:
        shown = ", ".join(informing[:8]) + (" ..." if len(informing) > 8 else "")
        console.print(
            f"The runs differ in {len(informing)} thing{'s' if len(informing) > 1 else ''}: {escape(shown)}\n"
        )
    for name, part in parts(report):
        if name:
            console.print(f"\n[bold]{escape(name)}[/bold]")
        console.print(_scores(part))
        if len(report.tasks) > 1:
            for table in _tasks(part):
                console.print(table)
    console.print(_costs(report))
    if report.retention:
        console.print(_forgetting(report))


def _scores(report: Report) -> Table:
    metrics = list(next(iter(report.tunings.values())).scores[report.task])
    table = Table(
        title=f"{report.task}: test scores x100{unscaled(report)}, main metric with 95 % interval", title_justify="left"
    )
    table.add_column("tuning")
    for metric in metrics:
        table.add_column(short(metric), justify="right", no_wrap=True)
    table.add_column("val loss", justify="right")
    for name, tuning in report.tunings.items():
        scores = tuning.scores[report.task]
        cells = [_cell(scores[metric], metric, metric == report.metric) for metric in metrics]
        loss = "-" if tuning.validation_loss is None else f"{tuning.validation_loss:.3f}"
        table.add_row(name, *cells, loss)
    if human := report.human.get(report.task):
        cells = [_cell(human[one], one, one == report.metric) if one in human else "-" for one in metrics]
        table.add_row("(human)", *cells, "-")
    return table


def _cell(score: Score, metric: str, with_interval: bool) -> str:
    text = figure(score.value, metric)
    return f"{text} \\[{figure(score.low, metric)}, {figure(score.high, metric)}]" if with_interval else text


def _tasks(report: Report) -> list[Table]:
    """Tasks by tunings; where there are many tunings the other way round, a few tasks a table."""
    found = [["task", *report.tunings, *(["(human)"] if report.human else [])]]
    for task in report.tasks:
        metric = list(next(iter(report.tunings.values())).scores[task])[-1]
        cells = [f"{task} ({short(metric)})"]
        for tuning in report.tunings.values():
            mark = "*" if task in {row.task for row in tuning.mixture} else ""
            cells.append(f"{main_score(tuning, task).value * 100:.1f}{mark}")
        if report.human:
            human = report.human.get(task, {}).get(metric)
            cells.append(figure(human.value, metric) if human else "-")
        found.append(cells)
    if len(report.tunings) <= 5:
        return [_task_table(found)]
    names, *tasks = found
    tables = []
    for start in range(0, len(tasks), _TASKS_BESIDE):
        columns = [["tuning", *names[1:]], *tasks[start : start + _TASKS_BESIDE]]
        tables.append(_task_table([list(row) for row in zip(*columns, strict=True)]))
    return tables


def _task_table(rows: list[list[str]]) -> Table:
    table = Table(title="each task: test score x100; * trained on it", title_justify="left")
    for place, head in enumerate(rows[0]):
        table.add_column(head, justify="right" if place else "left", no_wrap=not place, max_width=None if place else 26)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def main_score(tuning: TuningReport, task: str) -> Score:
    """A tuning's score by the task's main metric, its last."""
    return list(tuning.scores[task].values())[-1]


def _costs(report: Report) -> Table:
    table = Table(title="cost: seconds and memory of training, tokens of a prompt", title_justify="left")
    for column in ("tuning", "trained", "share", "seconds", "peak", "on disk", "prompt"):
        table.add_column(column, justify="left" if column == "tuning" else "right")
    for name, tuning in report.tunings.items():
        table.add_row(
            name,
            count(tuning.trainable_parameters),
            f"{tuning.trainable_share:.2%}",
            f"{tuning.train_seconds:.0f}",
            "-" if tuning.peak_memory_bytes is None else size(tuning.peak_memory_bytes),
            size(tuning.file_bytes),
            f"{tuning.prompt_tokens:.0f} tok",
        )
    return table


def _forgetting(report: Report) -> Table:
    tasks = list(dict.fromkeys(one.task for one in report.retention))
    table = Table(title="retention: score after, and the change's 95 % interval", title_justify="left")
    table.add_column("tuning")
    for task in tasks:
        table.add_column(task, justify="right")
    before = {one.task: one for one in report.retention}
    if len({(one.task, one.before.value) for one in report.retention}) == len(tasks):  # of several runs on one base too
        table.add_row("(base)", *(_amount(before[task], before[task].before.value) for task in tasks))
    for name in dict.fromkeys(one.tuning for one in report.retention):
        rows = {one.task: one for one in report.retention if one.tuning == name}
        table.add_row(name, *(_change(rows[task]) if task in rows else "-" for task in tasks))
    return table


def _change(one: Retention) -> str:
    low, high = (figure(end, one.metric, signed=True) for end in (one.low, one.high))
    return f"{_amount(one, one.after.value)} \\[{low}, {high}]"


def _amount(one: Retention, value: float) -> str:
    unit = {"loss": " nats"}.get(one.metric, "" if reading(one.metric).scale == 100 else f" {one.metric}")
    return figure(value, one.metric) + unit


def short(metric: str) -> str:
    """A column heading for a metric."""
    return _SHORT.get(metric, metric)


def count(number: int) -> str:
    """A number of parameters in the unit a person reads."""
    if number < 1_000_000:
        return f"{number:,}"
    return f"{number / 1e6:.1f} M" if number < 1e9 else f"{number / 1e9:.2f} B"


def size(count: int) -> str:
    """Bytes in the unit a person reads."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit in ("B", "kB") else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError
