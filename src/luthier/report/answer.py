"""The finding in words: is prompting enough, and if not, which tuning?"""

from luthier.report.schema import Difference, Report


def answer(report: Report) -> str:
    """One or two sentences drawn from the intervals in the report, never from the bare means."""
    prompting = [name for name, tuning in report.tunings.items() if not tuning.trainable_parameters]
    tuned = [name for name in report.tunings if name not in prompting]
    best = max(report.tunings, key=lambda name: value(report, name))
    if not tuned:
        return f"{best} is the best prompt, at {figure(report, best)}; no tuning was trained."
    # Cheapest first: the smallest tuning that cannot be told from the best one.
    within = [name for name in tuned if name == best or not _worse(report, name, best)]
    if best in prompting:
        return f"Prompting is enough on this evidence: {best} reaches {figure(report, best)} and no tuning beats it."
    chosen = min(within, key=lambda name: (report.tunings[name].trainable_parameters, -value(report, name)))
    beaten = [name for name in prompting if _better(report, chosen, name)]
    text = f"{chosen} is the smallest tuning within noise of the best, at {figure(report, chosen)}"
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


def figure(report: Report, name: str) -> str:
    """The main metric in words."""
    return f"{report.metric} {value(report, name) * 100:.1f}"


def _count(report: Report) -> str:
    signature = report.tunings[next(iter(report.tunings))].scores[report.task][report.metric].signature
    return next((part[2:] for part in signature.split("|") if part.startswith("n:")), "these")


def _find(report: Report, ours: str, theirs: str) -> Difference | None:
    for one in report.comparisons:
        if (one.ours, one.theirs) == (ours, theirs):
            return one
        if (one.ours, one.theirs) == (theirs, ours):
            return one.model_copy(update={"value": -one.value, "low": -one.high, "high": -one.low})
    return None


def _better(report: Report, ours: str, theirs: str) -> bool:
    found = _find(report, ours, theirs)
    return found is not None and found.low > 0


def _worse(report: Report, ours: str, theirs: str) -> bool:
    return _better(report, theirs, ours)


def _forgetting(report: Report, name: str) -> str:
    rows = [one for one in report.retention if one.tuning == name and one.metric != "loss"]
    if not rows:
        return ""
    lost = [one for one in rows if one.high < 0]
    if not lost:
        return f"It forgot nothing measurable on {' and '.join(one.task for one in rows)}."
    return "It lost " + " and ".join(f"{-one.difference * 100:.1f} points on {one.task}" for one in lost) + "."
