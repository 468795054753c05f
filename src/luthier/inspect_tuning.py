"""What did it learn? Each method's own view: words, spectra, factors, norms, or how far each block moved."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from luthier.data.task import Example, Task
from luthier.encoding.batches import encode_all
from luthier.evaluation.score import answer, loss_and_accuracy, measure
from luthier.files import write_json, write_whole
from luthier.held_out import held_out
from luthier.report.inspection import picture
from luthier.session import Session
from luthier.tuning.inspect_added import inspect_adapters, inspect_prefix, inspect_scalings
from luthier.tuning.inspect_prompt import inspect_prompt, replaced_by_tokens
from luthier.tuning.inspect_weights import inspect_lora, inspect_substitutes


def inspect(
    run: str | Path,
    tuning: str,
    *,
    neighbours: int = 5,
    rows: int = 20,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Say what a trained tuning of a run learnt; write it and its picture to the run's `inspect` folder.

    A soft prompt is also scored on up to `rows` held-out rows beside the base without it and beside its nearest tokens in
    its place (0 rows: not scored). Raises UserError for a tuning that trained nothing.
    """
    session = Session(run)
    base, method = session.base, session.trained(tuning)
    found: dict[str, Any] = {"luthier": 1, "tuning": tuning, "method": method.method}
    if tuning in base.grafts.prompts:
        say("looking for neighbours")
        prompt = inspect_prompt(base, tuning, neighbours, session.recipe.seed)
        found["prompt"] = asdict(prompt)
        if rows:
            found["faithfulness"] = _faithfulness(session, tuning, prompt.ids, rows, say)
    if spectra := inspect_lora(base, tuning) or inspect_adapters(base, tuning):
        found["spectra"] = [asdict(one) for one in spectra]
    if scalings := inspect_scalings(base, tuning):
        found["scalings"] = [asdict(one) for one in scalings]
    if tuning in base.grafts.prefixes:
        found["prefix"] = [asdict(one) for one in inspect_prefix(base, tuning, session.recipe.seed)]
    if tuning in base.grafts.substitutes:
        found["changes"] = [asdict(one) for one in inspect_substitutes(base, tuning)]
    folder = session.directory.path / "inspect"
    write_json(folder / f"{tuning}.json", found)
    write_whole(folder / f"{tuning}.svg", picture(found).encode())
    return found


def _faithfulness(
    session: Session, tuning: str, ids: list[int], limit: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """The task's loss and main metric with the prompt, with its nearest tokens instead, and without either.

    `kept` is the share of the prompt's gain in loss that the tokens give; None where the prompt gains nothing.
    """
    split, tasks = held_out(session.recipe, tuning, limit)
    reserve = session.recipe.tunings[tuning].method.virtual_tokens()  # type: ignore[union-attr]
    scores: dict[str, dict[str, float]] = {}
    for what in ("prompt", "tokens", "without"):
        say(f"scoring {what}")
        session.base.use(None if what == "without" else tuning)
        if what == "tokens":
            with replaced_by_tokens(session.base, tuning, ids):
                scores[what] = _score(session, tasks, reserve)
        else:
            scores[what] = _score(session, tasks, reserve)
    session.base.use(tuning)
    gain = scores["without"]["loss"] - scores["prompt"]["loss"]
    kept = (scores["without"]["loss"] - scores["tokens"]["loss"]) / gain if gain > 0 else None
    return {"split": split, "rows": sum(len(each) for _, each in tasks), "scores": scores, "kept": kept}


def _score(session: Session, tasks: Sequence[tuple[Task, Sequence[Example]]], reserve: int) -> dict[str, float]:
    """Loss over all rows, and each task's main metric; of several tasks by `task metric`."""
    rows = encode_all(session.encoder, [row for _, each in tasks for row in each], reserve)
    found = {"loss": loss_and_accuracy(session.base, rows)[0]}
    for task, each in tasks:
        metric = next((one for one in reversed(task.judged_by) if one != "loss"), None)
        if metric:
            predictions = answer(session.base, session.encoder, each, task.max_new_tokens, reserve)
            score = measure(predictions, [metric])[metric]
            found[metric if len(tasks) == 1 else f"{task.name} {metric}"] = score.value
    return found
