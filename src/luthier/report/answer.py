"""The finding in words: is prompting enough, and if not, which tuning?"""

from luthier.metrics import MODEL_METRICS, reading
from luthier.report.figures import better, examples_of, figure, gain, rank
from luthier.report.schema import Report, Retention


def answer(report: Report) -> str:
    """One or two sentences drawn from the report's corrected p-values and intervals, never from the bare means.

    The best is the one of the least validation loss (of several runs, whose validation rows may differ, of the best test
    score), so that the test judges what it did not choose.
    """
    prompting = [name for name, tuning in report.tunings.items() if not tuning.trainable_parameters]
    tuned = [name for name in report.tunings if name not in prompting]
    best = _best(report)
    if not tuned:
        return f"{best} is the best prompt, at {_named(report, best)}; no tuning was trained."
    # Cheapest first: the smallest tuning that cannot be told from the best one.
    within = [name for name in tuned if name == best or not _worse(report, name, best)]
    ahead = [name for name in tuned if _better(report, name, best)]
    if best in prompting and not ahead:
        return f"Prompting is enough on this evidence: {best} reaches {_named(report, best)} and no tuning beats it."
    within = ahead if best in prompting else within
    chosen = min(within, key=lambda name: (report.tunings[name].trainable_parameters, -_rank(report, name)))
    beaten = [name for name in prompting if _better(report, chosen, name)]
    text = f"{chosen} is the smallest tuning within noise of the best, at {_named(report, chosen)}"
    text += f" for {report.tunings[chosen].trainable_share:.2%} of the weights"
    if prompting and len(beaten) == len(prompting):
        text += f"; it beats {' and '.join(prompting)} with 95 % confidence"
    elif prompting:
        unclear = [name for name in prompting if name not in beaten]
        text += f"; its lead over {' and '.join(unclear)} is not certain on {_count(report)} examples"
    if better_ones := [name for name in tuned if _better(report, name, chosen)]:
        text += f"; on the test {' and '.join(better_ones)} did better"
    return f"{text}. {_forgetting(report, chosen)}".strip()


def _best(report: Report) -> str:
    losses = {name: tuning.validation_loss for name, tuning in report.tunings.items()}
    known = {name: loss for name, loss in losses.items() if loss is not None}
    if not report.runs and len(known) == len(losses):
        return min(known, key=lambda name: known[name])
    return max(report.tunings, key=lambda name: _rank(report, name))


def value(report: Report, name: str) -> float:
    """The main metric of a tuning."""
    return report.tunings[name].scores[report.task][report.metric].value


def _rank(report: Report, name: str) -> float:
    return rank(value(report, name), report.metric)


def _named(report: Report, name: str) -> str:
    """The main metric in words."""
    return f"{report.metric} {figure(value(report, name), report.metric)}"


def _count(report: Report) -> str:
    signature = report.tunings[next(iter(report.tunings))].scores[report.task][report.metric].signature
    return str(examples_of(signature) or "these")


def _better(report: Report, ours: str, theirs: str) -> bool:
    return any({one.ours, one.theirs} == {ours, theirs} and better(one) == ours for one in report.comparisons)


def _worse(report: Report, ours: str, theirs: str) -> bool:
    return _better(report, theirs, ours)


def _forgetting(report: Report, name: str) -> str:
    """What was lost for certain: of scores in points; a loss, which moves first, is told beside them."""
    rows = [one for one in report.retention if one.tuning == name]
    scores = [one for one in rows if one.metric not in MODEL_METRICS]
    lost = [one for one in rows if gain(one.low, one.high, one.metric)[1] < 0]
    told = [f"{_points(one)} on {one.task}" for one in lost if one in scores]
    rises = [f"the {one.metric} on {one.task} rose by {abs(one.difference):.2f}" for one in lost if one not in scores]
    if not rows:
        return ""
    if not lost:
        return f"It forgot nothing measurable on {_listed([one.task for one in rows])}."
    said = f"It lost {' and '.join(told)}" if told else ""
    if scores and not told:
        said = f"It lost nothing measurable on {_listed([one.task for one in scores])}"
    whole = "; ".join(part for part in (said, " and ".join(rises)) if part)
    return f"{whole[0].upper()}{whole[1:]}."


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]


def _points(one: Retention) -> str:
    amount = figure(abs(one.difference), one.metric)
    return f"{amount} {'points' if reading(one.metric).scale == 100 else one.metric}"
