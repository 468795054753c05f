"""The main job: one recipe in, one comparison out."""

import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from luthier import stage
from luthier.audit_rows import audit, stop_on_errors
from luthier.data.task import Task
from luthier.directory import RunDirectory
from luthier.errors import Interrupted, MemoryRanOut, UserError
from luthier.evaluation.human import human_score
from luthier.held_out import with_its_shots
from luthier.launched import LOOK, WORD, Failure, Launched, launched
from luthier.metrics import METRICS, metric
from luthier.metrics.score import Score
from luthier.models.base import BaseModel
from luthier.models.shard import check_shard
from luthier.plan import TuningPlan, advised, plan
from luthier.prompt_search import candidates
from luthier.recipe import BASELINE, Recipe
from luthier.report.build import build_report
from luthier.report.files import write_report
from luthier.report.schema import Report
from luthier.training.loop import check_ranks
from luthier.training.own_hooks import own_hooks
from luthier.tuning import BestTemplate, FewShot, Interpolation, Method, attach, detach


def run(recipe: Recipe, out: str | Path, *, resume: bool = False, isolate: bool = True) -> Report:
    """Score the base, train and score each tuning of the recipe, and write the comparison into `out`.

    With `isolate` each tuning has its own process, and its peak memory is its own; without, all share this
    one. A stopped run goes on with `resume`. Raises UserError for a mistake in the recipe or its data
    (nothing is written then) and Interrupted when a signal stopped it (its state is saved).

    Where torchrun or `accelerate launch` started several processes, all call this: rank 0 checks, decides and reports,
    and each has a process of its own for every stage, which compute together.
    """
    process = launched()
    if process and process.rank:
        return _follow(process)
    loaded = [(task, recipe.examples(task)) for task in (*recipe.tasks, *recipe.retention)]
    for task, examples in loaded:
        for name in task.judged_by:
            metric(name).needs()
        if not examples.test:
            raise UserError(f"The test split of task {task.name!r} has no rows. Set `test` to a file or a share.")
    for tuning in recipe.tunings.values():
        if tuning.training.watch in METRICS:
            metric(tuning.training.watch).needs()
        own_hooks(tuning.training.hooks, recipe.data_folder)
        if process and isinstance(tuning.method, Method):
            check_ranks(tuning.training, process.size)
    findings = audit(recipe, [examples for _, examples in loaded])
    stop_on_errors(findings)
    _rehearse(recipe, divides=bool(process))
    directory = RunDirectory.create(Path(out), recipe, resume)
    directory.save_audit(findings)
    stages = ([BASELINE] if recipe.retention else []) + list(recipe.tunings)
    left = [name for name in stages if directory.result(name) is None]
    if process:
        process.tell("run", {"folder": str(directory.path.absolute()), "stages": left})
    for name in left:
        _run_one(directory, name, isolate, process)
    report = _report(directory, recipe)
    if process:
        process.tell("reported", True)
        process.part()
    return report


def _follow(process: Launched) -> Report:
    """Run the stages that rank 0 names, with it, and wait for its report."""
    asked = process.ask("run")
    try:
        directory = RunDirectory.open(Path(asked["folder"]), writes=False)
    except UserError as error:
        message = f"Rank {process.rank}: {error} Put it on a file system that all machines share."
        raise process.fail(Failure(2, message)).error() from None
    for name in asked["stages"]:
        _in_own_process(directory, name, process)
    process.ask("reported")
    process.part()
    return Report.model_validate_json((directory.path / "report.json").read_text(encoding="utf-8"))


def _rehearse(recipe: Recipe, divides: bool) -> None:
    """Attach every tuning to the base's skeleton: a pattern that matches nothing is found before hours of work.

    `divides`: whether there are processes over which the base is divided where `training.shard` asks for it.
    """
    base = BaseModel.skeleton(recipe.base)
    if divides and any(
        one.shard for one in (recipe.training, *(tuning.training for tuning in recipe.tunings.values()))
    ):
        check_shard(base)
    for name in recipe.tunings:
        method = recipe.method(name)
        if isinstance(method, FewShot):  # whether there are as many rows to show
            tasks = [(task, replace(recipe.examples(task), validation=[], test=[])) for task in recipe.tasks]
            with_its_shots(method, tasks, recipe.read_encoder(), recipe.seed)
        if isinstance(method, BestTemplate):
            for task in recipe.tasks:
                for _, one in candidates(recipe, task, method):
                    recipe.examples(one)  # a column that is not there; what is rendered is kept for the stage
        source = recipe.method(method.of) if isinstance(method, Interpolation) else method
        if isinstance(source, Method):
            attach(base, name, source, recipe.seed)
            if isinstance(method, Interpolation):
                source.toward_base(base, name, method.share)
            detach(base, name)


def _run_one(directory: RunDirectory, name: str, isolate: bool, process: Launched | None) -> None:
    try:
        if isolate or process:
            _in_own_process(directory, name, process)
        else:
            with stage.explained_memory(name):
                stage.run_stage(directory, name)
    except UserError as error:
        advice = advised(directory.recipe(), name) if isinstance(error, MemoryRanOut) and name != BASELINE else ""
        if not directory.started():
            directory.remove()  # nothing was found yet: leave no half-written run behind
        if advice:
            raise UserError(f"{error}\n{advice}") from None
        raise


def _in_own_process(directory: RunDirectory, name: str, process: Launched | None) -> None:
    """Run a stage as a child; a stop signal is passed on, and the child saves before it ends."""
    if process and (failure := process.failure()):
        raise failure.error()
    message = directory.path / ".error"
    message.unlink(missing_ok=True)
    child = subprocess.Popen(
        [sys.executable, "-m", "luthier.stage", str(directory.path), name],
        # Ctrl-C reaches the whole group: here it is passed on once, so that it cannot strike while modules load.
        preexec_fn=_leave_interrupts_to_parent,
    )
    stopped: list[int] = []
    in_main_thread = _forward_signals(child, stopped)
    try:
        code = _wait(child, process)
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
        for number, handler in in_main_thread.items():
            signal.signal(number, handler)
    if code == 0:
        return
    said = message.read_text(encoding="utf-8") if message.is_file() else ""
    message.unlink(missing_ok=True)
    if process:
        raise process.fail(_reason(code, name, process.rank, bool(stopped))).error()
    if code == stage.EXIT_MEMORY:
        raise MemoryRanOut(said)
    if code == 2:
        raise UserError(said)
    if said or stopped:
        raise Interrupted(said or f"{name!r} was stopped before it had begun.")
    if code < 0:  # SIGKILL is what the system sends where its memory ran out
        kind = MemoryRanOut if -code == signal.SIGKILL else UserError
        raise kind(_killed(code, f"The process of {name!r}"))
    raise RuntimeError(f"the stage {name!r} failed with exit code {code}; see the traceback above")


def _wait(child: "subprocess.Popen[bytes]", process: Launched | None) -> int:
    """The child's exit code; of several processes' children, those that wait for one that failed are ended."""
    while process:
        try:
            return child.wait(LOOK)
        except subprocess.TimeoutExpired:
            if process.failure() is None:
                continue
        try:
            return child.wait(WORD)
        except subprocess.TimeoutExpired:
            child.kill()
    return child.wait()


def _reason(code: int, name: str, rank: int, stopped: bool) -> Failure:
    """What to tell the others of a stage that ended without having told them itself."""
    who = f"The process of {name!r} on rank {rank}"
    if stopped:
        return Failure(3, f"{name!r} was stopped before it had begun.")
    return Failure(2, _killed(code, who)) if code < 0 else Failure(1, f"{who} failed with exit code {code}.")


def _killed(code: int, who: str) -> str:
    return (
        f"{who} was killed ({signal.Signals(-code).name}); what was saved is kept. If memory ran out, lower "
        "training.micro_batch_tokens or max_length. Then continue with --resume."
    )


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _forward_signals(child: "subprocess.Popen[bytes]", stopped: list[int]) -> dict[int, Any]:
    def forward(number: int, _: object) -> None:
        stopped.append(number)
        child.send_signal(signal.SIGTERM)

    handlers: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        try:
            handlers[number] = signal.signal(number, forward)
        except ValueError:  # not in the main thread: its owner deals with signals
            break
    return handlers


def _report(directory: RunDirectory, recipe: Recipe) -> Report:
    results = {name: directory.result(name) or {} for name in recipe.tunings}
    planned = _plans(recipe)
    directory.save_plan({name: asdict(one) for name, one in planned.items()})
    report = build_report(
        recipe,
        directory.environment(),
        directory.audit(),
        directory.result(BASELINE) or {"scores": {}},
        results,
        {name: directory.answers(name) for name in (BASELINE, *recipe.tunings)},
        {task.name: _human(recipe, task) for task in recipe.tasks},
        {name: one.phases[one.measured_phase()] for name, one in planned.items()},
    )
    write_report(directory.path, report)
    directory.forget_checkpoints()
    return report


def _plans(recipe: Recipe) -> dict[str, TuningPlan]:
    """What each tuning was expected to hold, to stand beside what it held; made last, so that it delays nothing."""
    try:
        return plan(recipe, available=sys.maxsize)
    except Exception:  # a base whose code does not run without numbers is no reason to lose a run
        return {}


def _human(recipe: Recipe, task: Task) -> dict[str, Score]:
    """The references of a task's test rows scored against each other, by metric; none where rows have one each."""
    references = [example.references for example in recipe.examples(task).test]
    found = {name: human_score(name, references) for name in task.judged_by if name in METRICS}
    return {name: score for name, score in found.items() if score is not None}
