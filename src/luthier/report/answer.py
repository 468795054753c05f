"""The finding in words: is prompting enough, and if not, which tuning?"""

from luthier.metrics import MODEL_METRICS, reading
from luthier.report.figures import better, examples_of, figure, gain, rank
from luthier.report.schema import Report, Retention


def answer(report: Report) -> str:
    """One or two sentences drawn from the report's corrected p-values and intervals, never from the bare means."""
    prompting = [name for name, tuning in report.tunings.items() if not tuning.trainable_parameters]
    tuned = [name for name in report.tunings if name not in prompting]
    best = max(report.tunings, key=lambda name: _rank(report, name))
    if not tuned:
        return f"{best} is the best prompt, at {_named(report, best)}; no tuning was trained."
    # Cheapest first: the smallest tuning that cannot be told from the best one.
    within = [name for name in tuned if name == best or not _worse(report, name, best)]
    if best in prompting:
        return f"Prompting is enough on this evidence: {best} reaches {_named(report, best)} and no tuning beats it."
    chosen = min(within, key=lambda name: (report.tunings[name].trainable_parameters, -_rank(report, name)))
    beaten = [name for name in prompting if _better(report, chosen, name)]
    text = f"{chosen} is the smallest tuning within noise of the best, at {_named(report, chosen)}"
    text += f" for {report.tunings[chosen].trainable_share:.2%} of the weights"
    if prompting and len(beaten) == len(prompting):
        text += f"; it beats {' and '.join(prompting)} with 95 % confidence"
    elif prompting:
        unclear = [name for name in prompting if name not in beaten]
        text += f"; its lead over {' and '.join(unclear)} is not certain on {_count(report)} examples"
    return f"{text}. {_forgetting(report, chosen)}".strip()


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
    rows = [one for one in report.retention if one.tuning == name and one.metric not in MODEL_METRICS]
    if not rows:
        return ""
    lost = [one for one in rows if gain(one.low, one.high, one.metric)[1] < 0]
    if not lost:
        return f"It forgot nothing measurable on {' and '.join(one.task for one in rows)}."
    return "It lost " + " and ".join(f"{_points(one)} on {one.task}" for one in lost) + "."


def _points(one: Retention) -> str:
    amount = figure(abs(one.difference), one.metric)
    return f"{amount} {'points' if reading(one.metric).scale == 100 else one.metric}"
