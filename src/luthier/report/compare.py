"""Several finished runs as one report: the same page, tables and files, nothing compared that is not comparable."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from luthier.errors import UserError
from luthier.evaluation.bootstrap import compare, holm
from luthier.report.answer import answer
from luthier.report.files import FILES, write_report
from luthier.report.mismatches import comparable, mismatches
from luthier.report.parts import parts
from luthier.report.runs import FinishedRun, open_runs
from luthier.report.schema import (
    SCHEMA_VERSION,
    AuditFinding,
    Difference,
    ExampleReport,
    Report,
    Retention,
)
from luthier.report.seeds import Repeats, put_together
from luthier.report.shared import shared


def compare_runs(paths: Sequence[Path], out: Path) -> Report:
    """Compare finished runs on the task that they share, and write the report's files into `out`.

    Runs of one recipe with several seeds become one. Pairs are tested only where the test examples and the metric's
    signature are the same. Raises UserError for what `open_runs` refuses, for runs without a task and a metric in common,
    and for a folder that holds anything but an earlier comparison.
    """
    _refuse_other(out)
    report = compared(open_runs(paths))
    write_report(out, report)
    return report


def compared(runs: Sequence[FinishedRun]) -> Report:
    """The report over several runs."""
    groups = put_together(runs)
    found = shared(groups)
    task, metric = found.task, found.metric
    together = comparable(groups, task, metric)
    named = {(group.name, tuning): _name(groups, group, tuning) for group in groups for tuning in _tunings(group)}
    tunings = {
        named[group.name, tuning]: found.narrowed(group.tuning(tuning))
        for group in groups
        for tuning in _tunings(group)
    }
    first = groups[0].first.report
    alike = all(group.first.report.base == first.base for group in groups)
    report = Report(
        schema_version=SCHEMA_VERSION,
        task=task,
        tasks=found.tasks,
        metric=metric,
        answer="",
        base=first.base,
        base_scores=first.base_scores if alike else {},
        tunings=tunings,
        comparisons=_comparisons(together, task, metric, named),
        retention=[one for group in groups for one in _retention(group, named)],
        human=first.human if len(together) == 1 else {},
        examples=_examples(groups, named),
        regressions=[
            one.model_copy(
                update={"tuning": named[group.name, one.tuning], "against": named.get((group.name, one.against), one.against)}
            )
            for group in groups
            for one in group.first.report.regressions
        ],
        runs=[
            group.described().model_copy(update={"part": number})
            for group in groups
            for number, members in enumerate(together)
            if group in members
        ],
        mismatches=mismatches(groups, task, found.common),
        audit=_audit(groups),
        recipe={group.name: group.first.report.recipe for group in groups},
        environment={group.name: group.first.report.environment for group in groups},
    )  # fmt: skip
    return report.model_copy(update={"answer": _answer(report)})


def _refuse_other(out: Path) -> None:
    """An earlier comparison is made anew; nothing else is written over."""
    if out.exists() and (not out.is_dir() or {one.name for one in out.iterdir()} - set(FILES)):
        raise UserError(f"{out} exists and is no comparison of runs. Give another folder with --out.")


def _tunings(group: Repeats) -> list[str]:
    return list(group.first.report.tunings)


def _name(groups: Sequence[Repeats], group: Repeats, tuning: str) -> str:
    return f"{group.name}/{tuning}" if len(groups) > 1 else tuning


def _comparisons(
    together: Sequence[Sequence[Repeats]], task: str, metric: str, named: dict[tuple[str, str], str]
) -> list[Difference]:
    """Every pair of tunings that may be compared, with p-values corrected for their number."""
    found = []
    for groups in together:
        scores = {
            named[group.name, tuning]: group.sampled(tuning, task, metric) for group in groups for tuning in _tunings(group)
        }  # fmt: skip
        pairs = [(ours, theirs) for theirs, ours in combinations(scores, 2)]
        found += [(ours, theirs, compare(scores[ours], scores[theirs])) for ours, theirs in pairs]
    corrected = holm([one.p for _, _, one in found]) if found else []
    return [
        Difference(
            ours=ours, theirs=theirs, task=task, metric=metric,
            value=one.value, low=one.low, high=one.high, p=one.p, p_corrected=adjusted,
        )
        for (ours, theirs, one), adjusted in zip(found, corrected, strict=True)
    ]  # fmt: skip


def _retention(group: Repeats, named: dict[tuple[str, str], str]) -> list[Retention]:
    """What each tuning forgot, as its run found it; over several seeds the means, with the seeds' spread in the interval."""
    found = []
    for one in group.first.report.retention:
        name = named[group.name, one.tuning]
        if len(group.runs) == 1:
            found.append(one.model_copy(update={"tuning": name}))
            continue
        base = group.over([run.baseline(one.task, one.metric) for run in group.runs])
        change = compare(group.sampled(one.tuning, one.task, one.metric), base)
        found.append(
            one.model_copy(
                update={
                    "tuning": name,
                    "after": group.score(one.tuning, one.task, one.metric),
                    "difference": change.value,
                    "low": change.low,
                    "high": change.high,
                }
            )
        )
    return found


def _examples(groups: Sequence[Repeats], named: dict[tuple[str, str], str]) -> list[ExampleReport]:
    """Examples that every run shows, with all answers; of several seeds the first's."""
    found = []
    for example in groups[0].first.report.examples:
        same = [next((one for one in group.first.report.examples if _same(one, example)), None) for group in groups]
        if all(same):
            outputs = {
                named[group.name, tuning]: text
                for group, one in zip(groups, same, strict=True)
                if one
                for tuning, text in one.outputs.items()
            }
            found.append(example.model_copy(update={"outputs": outputs}))
    return found


def _same(ours: ExampleReport, theirs: ExampleReport) -> bool:
    return (ours.id, ours.task, ours.references) == (theirs.id, theirs.task, theirs.references)


def _audit(groups: Sequence[Repeats]) -> list[AuditFinding]:
    """The runs' warnings, each once."""
    found: dict[tuple[str, str, int, tuple[str, ...]], AuditFinding] = {}
    for group in groups:
        for one in group.first.report.audit:
            found.setdefault((one.kind, one.split, one.count, tuple(one.rows)), one)
    return list(found.values())


def _answer(report: Report) -> str:
    """The finding; where not all runs can be compared, one for those that can, each by itself."""
    found = parts(report)
    if len(found) == 1:
        return answer(report)
    said = " ".join(f"{name}: {answer(part)}" for name, part in found)
    return (
        f"The runs cannot all be compared on {report.task} (other test examples or another signature), so each part "
        f"stands by itself. {said}"
    )
