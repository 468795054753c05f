"""A stage that trains nothing: the base asked as it is, with examples in its prompt, or with the best of several templates."""

from dataclasses import replace
from typing import Any

from luthier.held_out import with_its_shots
from luthier.models.memory import peak_bytes
from luthier.prompt_search import best_templates
from luthier.scoring import Stage, encode, request_cost, score_tasks, validate, validation_examples
from luthier.tuning import BestTemplate, FewShot, Prompting


def prompting(stage: Stage, name: str, method: Prompting) -> dict[str, Any]:
    """Score the base as it is; its retention is the baseline's, for nothing was changed."""
    asked = method.shot_count()
    tried: dict[str, Any] = {}
    if isinstance(method, BestTemplate):
        chosen, tried = best_templates(stage, method)
        stage = replace(stage, tasks=chosen)
    if asked:  # training's limit on rows is no limit on what the model can read
        stage = replace(stage, encoder=stage.encoder.widened(stage.base.context))
    full = isinstance(method, FewShot) and method.shots == "full"
    prepared = with_its_shots(method, stage.tasks, stage.encoder, stage.recipe.seed)
    kept = [len(example.shots) for _, examples in prepared for example in examples.test]
    if full:
        asked = max(kept)
    elif asked and min(kept) < asked:
        stage.progress.say(
            f"{sum(count < asked for count in kept)} of {len(kept)} prompts hold fewer than {asked} shots "
            f"(least {min(kept)}): the limit is {stage.encoder.max_length} tokens"
        )
    stage = replace(stage, tasks=prepared)
    validation = encode(stage, validation_examples(stage), 0, "validation")
    kept_at = validate(stage, validation, 0) if validation else None
    scores = score_tasks(stage, name, 0)
    return {
        "method": method.method,
        "trainable_parameters": 0,
        "file_bytes": 0,
        "train_seconds": 0.0,
        "steps": 0,
        "peak_memory_bytes": peak_bytes(),
        "validation_loss": kept_at.loss if kept_at else None,
        "validation_accuracy": kept_at.accuracy if kept_at else None,
        "shots": {"asked": asked, "least": min(kept), "mean": sum(kept) / len(kept)},
        "scores": scores,
        "inference": request_cost(stage, None, 0),
        "templates": tried,
        "history": [],
        "cut": 0,
    }
