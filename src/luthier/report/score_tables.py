"""What the tunings reached: all of them, task by task, pair by pair, and what they forgot."""

from luthier.report.cells import NOTHING, Cell, Table, score_cell
from luthier.report.figures import better, examples_of, figure, gain, rank
from luthier.report.schema import Difference, Report, Retention, TuningReport
from luthier.report.table import main_score, short, size


def tunings_table(report: Report) -> Table:
    """A row a tuning: what was trained, its scores, its costs; the main metric stands first."""
    first = next(iter(report.tunings.values()))
    metrics = sorted(first.scores[report.task], key=lambda metric: metric != report.metric)
    rows = []
    for name, tuning in report.tunings.items():
        loss = tuning.validation_loss
        rows.append(
            (
                Cell(name, _method(name, tuning), name),
                *(score_cell(tuning.scores[report.task].get(metric), metric) for metric in metrics),
                Cell(f"{loss:.3f}", value=loss) if loss is not None else NOTHING,
                Cell(f"{tuning.trainable_parameters:,}", value=tuning.trainable_parameters),
                Cell(f"{tuning.trainable_share:.2%}", value=tuning.trainable_share),
                Cell(f"{tuning.train_seconds:.0f}", value=tuning.train_seconds),
                Cell(size(tuning.peak_memory_bytes), value=tuning.peak_memory_bytes)
                if tuning.peak_memory_bytes
                else NOTHING,
                Cell(size(tuning.file_bytes), value=tuning.file_bytes),
                Cell(f"{tuning.prompt_tokens:.0f}", value=tuning.prompt_tokens),
            )
        )
    if human := report.human.get(report.task):
        scores = [score_cell(human.get(metric), metric) for metric in metrics]
        people = Cell("(human)", "each reference against the others", "(human)")
        rows.append((people, *scores, *[NOTHING] * 7))
    costs = ("trained", "share", "seconds", "peak memory", "on disk", "prompt tokens")
    return Table("tunings", ("tuning", *(short(metric) for metric in metrics), "val loss", *costs), tuple(rows))


def _method(name: str, tuning: TuningReport) -> str:
    """What the name does not say."""
    said = [tuning.method] if tuning.method != name.rpartition("/")[2] else []
    if tuning.shots.asked:
        said.append(f"{tuning.shots.asked} shot{'s' if tuning.shots.asked > 1 else ''}")
    if tuning.seeds:
        said.append(f"mean of seeds {', '.join(map(str, tuning.seeds))}")
    return ", ".join(said)


def tasks_table(report: Report) -> Table:
    """A mixture's tasks, each by its own metric; a star marks those that the tuning was trained on."""
    if len(report.tasks) < 2:
        return Table("tasks", (), ())
    rows = []
    for task in report.tasks:
        metric = list(next(iter(report.tunings.values())).scores[task])[-1]
        cells = [Cell(task, metric, task)]
        for tuning in report.tunings.values():
            cell = score_cell(main_score(tuning, task), metric)
            star = "*" if task in {row.task for row in tuning.mixture} else ""
            cells.append(Cell(cell.text + star, cell.detail, cell.value))
        if report.human:
            cells.append(score_cell(report.human.get(task, {}).get(metric), metric))
        rows.append(tuple(cells))
    return Table("tasks", ("task", *report.tunings, *(["(human)"] if report.human else [])), tuple(rows))


def pairs_table(report: Report) -> Table:
    """Every pair of tunings on the same examples, with the verdict after Holm's correction."""
    columns = (f"difference in {report.metric}", "value", "95 % interval", "p", "p, Holm", "verdict")
    return Table("pairs", columns, tuple(_pair(one) for one in report.comparisons))


def _pair(one: Difference) -> tuple[Cell, ...]:
    winner = better(one)
    return (
        Cell(f"{one.ours} \u2212 {one.theirs}"),
        Cell(figure(one.value, one.metric, signed=True), value=one.value),
        Cell(
            f"{figure(one.low, one.metric, signed=True)} to {figure(one.high, one.metric, signed=True)}", value=one.low
        ),
        Cell(f"{one.p:.4f}", value=one.p),
        Cell(f"{one.p_corrected:.4f}", value=one.p_corrected),
        Cell(f"{winner} is better" if winner else "not told apart"),
    )


def forgetting_table(report: Report) -> Table:
    """Tuning x retention task: the difference to the untouched base, shaded by how much, with an arrow where it is certain."""
    tasks = list(dict.fromkeys(one.task for one in report.retention))
    cells = {(one.tuning, one.task): one for one in report.retention}
    most = {task: max(abs(one.difference) for one in report.retention if one.task == task) or 1.0 for task in tasks}
    rows = []
    for name in dict.fromkeys(one.tuning for one in report.retention):
        found = [cells.get((name, task)) for task in tasks]
        changes = [_change(one, most[one.task]) if one else NOTHING for one in found]
        rows.append((Cell(name, value=name), *changes))
    by = {task: dict.fromkeys(short(one.metric) for one in report.retention if one.task == task) for task in tasks}
    heads = [f"{task} ({', '.join(by[task])})" for task in tasks]
    return Table("forgetting", ("tuning", *heads), tuple(rows))


def _change(one: Retention, most: float) -> Cell:
    low, high = gain(one.low, one.high, one.metric)
    certain = low > 0 or high < 0
    strength = 1 + min(2, int(3 * abs(one.difference) / most)) if certain else 1
    side = "gained" if rank(one.difference, one.metric) > 0 else "lost"
    arrow = {"gained": " \u25b2", "lost": " \u25bc"}[side] if certain else ""
    ends = f"{figure(one.low, one.metric, signed=True)} to {figure(one.high, one.metric, signed=True)}"
    path = f"{figure(one.before.value, one.metric)} \u2192 {figure(one.after.value, one.metric)}"
    return Cell(
        figure(one.difference, one.metric, signed=True) + arrow,
        f"{ends}; {path}",
        one.difference,
        f"{side} strength{strength}" if one.difference else "",
    )


def signatures_table(report: Report) -> Table:
    """What reproduces each score; where compared runs differ in one, each run's."""
    found: dict[tuple[str, str, str], None] = {}
    for tuning in report.tunings.values():
        for task, scores in tuning.scores.items():
            for metric, score in scores.items():
                found[task, metric, score.signature] = None
    rows = tuple(
        (Cell(task), Cell(metric), Cell(str(examples_of(signature) or "-")), Cell(signature, wide=True))
        for task, metric, signature in found
    )
    return Table("signatures", ("task", "metric", "examples", "signature"), rows)
