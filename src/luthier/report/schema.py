"""The shape of report.json. Stable: a key is added with a new minor, changed with a new `schema_version`."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Score(_Part):
    """A metric on a test split: value with its 95 % interval (bootstrap over examples), reproducible by signature."""

    value: float = Field(
        description="0-1 (matthews -1 to 1), but nist, cider, perplexity and loss (nats per target token)."
    )
    low: float
    high: float
    signature: str
    precision: float | None = Field(None, description="ROUGE and token_f1 only.")
    recall: float | None = Field(None, description="ROUGE and token_f1 only.")
    parts: dict[str, float] = Field({}, description="What else the value is made of: BLEU's precisions, say.")
    spread: float | None = Field(
        default=None, description="Standard deviation over training seeds, where runs of one recipe were put together."
    )


class Shots(_Part):
    """Examples shown in the prompt: asked for, the fewest that fitted, and the mean over test prompts."""

    asked: int
    least: int
    mean: float


class MixtureRow(_Part):
    """What a tuning was trained on, of one task in one form: the share asked for and got."""

    task: str
    form: str
    asked: float = Field(description="Share of all draws, 0-1.")
    got: float = Field(description="Share of the draws made, 0-1.")
    rows: int | None = Field(description="None: streamed, not counted.")
    epochs: float | None = Field(description="How often its rows were gone through.")
    tokens: int = Field(description="Prompt and target tokens trained on.")


class Speed(_Part):
    """Seconds until an answer's first token, and tokens a second after it."""

    first_token_seconds: float
    tokens_per_second: float


class Inference(Speed):
    """One request at a time: the test prompt of middle length."""

    prompt_tokens: int
    weights_bytes: int = Field(description="Of the base and the tuning, in memory.")
    merged: Speed | None = Field(description="With the tuning folded into the weights; null where it cannot be.")


class TriedTemplate(Score):
    """A template that a best_template tried, with the task's main metric on validation rows."""

    name: str
    number: int
    chosen: bool


class Snapshot(_Part):
    """A tuning as it was after a step of its training."""

    step: int
    scores: dict[str, dict[str, Score]]


class TuningReport(_Part):
    """One tuning: what it cost and what it reached."""

    method: str
    settings: dict[str, Any]
    trainable_parameters: int
    trainable_share: float = Field(description="Of the base's parameters, 0-1.")
    file_bytes: int
    train_seconds: float
    train_tokens: int
    score_seconds: float
    steps: int
    learning_rate: float | None
    peak_memory_bytes: int | None = Field(description="Of its own process; null where it had none of its own.")
    memory_after_import_bytes: int | None
    planned: dict[str, int] = Field(
        default={},
        description="Planned bytes by part at the peak of training and validation, and of answering where nothing is trained, to be held "
        "against the peak memory without that after import; empty where there is no plan.",
    )
    validation_loss: float | None = Field(description="Nats per target token, of the weights kept.")
    validation_accuracy: float | None = Field(
        description="On validation, 0-1: of the answers where the task has choices, else of the next token."
    )
    prompt_tokens: float = Field(description="Mean tokens of a test prompt.")
    shots: Shots
    cut: int = Field(description="Training prompts that lost their middle to fit max_length.")
    left_out: int = Field(
        0, description="Streamed rows that could not be trained on: no target, or no room for the prompt."
    )
    mixture: list[MixtureRow] = Field([], description="Empty where the recipe has one task.")
    history: list[dict[str, Any]]
    scores: dict[str, dict[str, Score]]
    inference: Inference | None = None
    templates: dict[str, list[TriedTemplate]] = Field({}, description="By task, what best_template chose among.")
    snapshots: list[Snapshot] = Field([], description="As training.snapshots asks for, in the order of steps.")
    run: str | None = Field(default=None, description="Of several runs compared: the one it is from.")
    seeds: list[int] = Field(
        default=[], description="Of runs put together: their seeds. Costs are means, memory the most."
    )


class Difference(_Part):
    """Paired bootstrap of `ours` minus `theirs` on the same test examples: 95 % interval and two-sided p-value."""

    ours: str
    theirs: str
    task: str
    metric: str
    value: float
    low: float
    high: float
    p: float = Field(description="Of no difference, from this comparison alone.")
    p_corrected: float = Field(description="The same, corrected for all comparisons of the report (Holm).")


class Retention(_Part):
    """A retention task before and after a tuning, on the same examples."""

    task: str
    tuning: str
    metric: str
    before: Score
    after: Score
    difference: float
    low: float
    high: float


class ExampleReport(_Part):
    """A test example with what each tuning answered."""

    id: str
    task: str = ""
    prompt: str
    references: list[str]
    outputs: dict[str, str]


class Regression(_Part):
    """A test row on which a tuning does worse than the base did: of the task against a prompt, or of a retention task."""

    tuning: str
    against: str = Field(description="The prompting tuning, or `base` for the untouched base on a retention task.")
    task: str
    id: str
    prompt: str
    references: list[str]
    metric: str
    before: float = Field(description="This row's own score.")
    after: float
    before_output: str
    after_output: str


class RunReport(_Part):
    """One of several runs compared, or those of one recipe that differ in the seed alone."""

    name: str
    paths: list[str]
    seeds: list[int]
    part: int = Field(
        default=0, description="Runs of one number have the same test examples and metric: they are compared."
    )
    base: dict[str, Any]
    recipe: dict[str, Any]
    environment: dict[str, Any]


class Mismatch(_Part):
    """Something in which compared runs differ, its value by run, and whether scores can be compared in spite of it."""

    what: str
    values: dict[str, str]
    comparable: bool


class AuditFinding(_Part):
    """A defect of the data that was let pass: its kind, the split, how many rows and the first of them."""

    kind: str
    level: str
    split: str
    count: int
    rows: list[str]
    example: str
    advice: str


class Report(_Part):
    """Everything one run found."""

    schema_version: int
    task: str = Field(description="The task or the mixture.")
    tasks: list[str] = Field([], description="The task, or those of the mixture.")
    metric: str = Field(description="The metric that the answer and the comparisons are about.")
    answer: str = Field(description="The finding in one or two sentences.")
    base: dict[str, Any]
    base_scores: dict[str, dict[str, Score]] = Field(description="The untouched base on the retention tasks.")
    tunings: dict[str, TuningReport]
    comparisons: list[Difference]
    retention: list[Retention]
    human: dict[str, dict[str, Score]] = Field(
        default={},
        description="Each human reference against the others, by task and metric, where test rows have several.",
    )
    examples: list[ExampleReport]
    regressions: list[Regression] = Field(
        default=[], description="The rows on which each tuning lost most against the base, the worst first."
    )
    runs: list[RunReport] = Field(default=[], description="Where several runs are compared: the runs.")
    mismatches: list[Mismatch] = Field(default=[], description="Where several runs are compared: how they differ.")
    audit: list[AuditFinding] = Field(description="Warnings about the data, found before training.")
    recipe: dict[str, Any]
    environment: dict[str, Any]


def report_schema() -> dict[str, Any]:
    """JSON schema of report.json."""
    return Report.model_json_schema()
