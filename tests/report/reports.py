"""A report as rich as they come, made up: every section of the page, hostile text, more tunings than colours."""

from typing import Any

from luthier.report.schema import (
    SCHEMA_VERSION,
    AuditFinding,
    Difference,
    ExampleReport,
    Inference,
    MixtureRow,
    Regression,
    Report,
    Retention,
    Score,
    Shots,
    Speed,
    TuningReport,
)

HOSTILE = (
    "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> {{ 7 * 7 }} & 'q' | `*_"
)
LONG = "incomprehensibilities" * 12  # a word that no phone is wide enough for


def score(value: float, metric: str = "rougeLsum") -> Score:
    signature = f"metric:{metric}|refs:3|n:40|interval:bootstrap95|resamples:10000|seed:0"
    return Score(value=value, low=value - 0.04, high=value + 0.04, signature=signature)


def tuning(place: int, **changes: Any) -> TuningReport:
    metrics = ("rouge1", "rougeLsum")
    trained = 0 if place < 2 else 10 ** (place + 1)
    steps = [{"step": step, "loss": 3 / step + place / 9} for step in range(1, 30)]
    checks = [
        {"step": step, "validation_loss": 2 / step, "validation_accuracy": 0.5 + step / 90} for step in (10, 20, 29)
    ]
    return TuningReport(**{
        "method": "lora" if trained else "zero_shot",
        "settings": {},
        "trainable_parameters": trained,
        "trainable_share": trained / 134_515_008,
        "file_bytes": trained * 4,
        "train_seconds": 30.5 * place if trained else 0.0,
        "train_tokens": 1000,
        "score_seconds": 1.0,
        "steps": 29 if trained else 0,
        "learning_rate": 1e-3 if trained else None,
        "peak_memory_bytes": 900_000_000 + 10**8 * place,
        "memory_after_import_bytes": 3 * 10**8,
        "validation_loss": 2.5 - place / 10,
        "validation_accuracy": 0.5,
        "prompt_tokens": 180.0,
        "shots": Shots(asked=place if place < 2 else 0, least=0, mean=0.0),
        "cut": 0,
        "mixture": [MixtureRow(task="summary", form="zero_shot", asked=0.75, got=0.7, rows=90, epochs=1.5, tokens=9000)] if trained else [],
        "history": steps + checks if trained else [],
        "inference": Inference(
            prompt_tokens=180, first_token_seconds=0.25, tokens_per_second=20.0 + place, weights_bytes=10**8,
            merged=Speed(first_token_seconds=0.2, tokens_per_second=25.0) if trained else None,
        ),
        "scores": {task: {one: score(0.2 + place / 40, one) for one in metrics} for task in ("summary", "topic", "both")},
        **changes,
    })  # fmt: skip


def rich(names: tuple[str, ...] = ("zero_shot", "one_shot", "prompt", "r2", "r8", "r64", "houlsby", "full")) -> Report:
    """Two tasks, eight tunings, of which two prompt; two retention tasks, one of them a loss."""
    tunings = {name: tuning(place) for place, name in enumerate(names)}
    retention = [
        Retention(
            task=task, tuning=name, metric=metric, before=score(0.5, metric), after=score(0.5 + change, metric),
            difference=change, low=change - 0.05, high=change + 0.05,
        )
        for task, metric, sign in (("topics", "accuracy", -1), ("instructions", "loss", 1))
        for place, name in enumerate(names[2:])
        for change in [sign * place / 40]
    ]  # fmt: skip
    outputs = {name: f"The guest wants a room {HOSTILE} {place}" for place, name in enumerate(names)}
    references = ["A guest wants a quiet room.", LONG]
    return Report(
        schema_version=SCHEMA_VERSION,
        task="both",
        tasks=["summary", "topic"],
        metric="rougeLsum",
        answer=f"r8 is the smallest tuning within noise of the best {HOSTILE}.",
        base={"model": "tiny", "family": "llama", "parameters": 134_515_008, "dtype": "bfloat16", "device": "cpu"},
        base_scores={"topics": {"accuracy": score(0.5, "accuracy")}},
        tunings=tunings,
        comparisons=[
            Difference(
                ours="r8", theirs="zero_shot", task="both", metric="rougeLsum", value=0.1, low=0.05, high=0.15, p=0.0002, p_corrected=0.0004,
            )
        ],
        retention=retention,
        human={"both": {"rouge1": score(0.6), "rougeLsum": score(0.55)}},
        examples=[
            ExampleReport(id=f"row {n}", task="summary", prompt=HOSTILE * n + LONG, references=references, outputs=outputs)
            for n in (1, 2, 30)
        ],
        regressions=[
            Regression(
                tuning="full", against="zero_shot", task="summary", id=HOSTILE, prompt=LONG, references=references,
                metric="rougeLsum", before=0.6, after=0.1, before_output=HOSTILE, after_output="",
            )
        ],
        audit=[
            AuditFinding(kind="duplicate", level="warning", split="train", count=1234, rows=[HOSTILE, LONG], example=HOSTILE, advice="Remove them."),
        ],
        recipe={"task": {"name": HOSTILE}},
        environment={"python": "3.11", "processor": LONG},
    )  # fmt: skip
