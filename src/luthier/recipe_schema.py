"""The JSON schema of a recipe as it is written, for editors."""

from typing import Any

from pydantic import TypeAdapter

from luthier.data.library import task_files
from luthier.metrics import METRICS, MODEL_METRICS
from luthier.recipe import Recipe
from luthier.shorthand import RETENTION
from luthier.tuning import METHODS


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe as it is written, shorthands included, for editors."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    tuned = []
    for name, kind in METHODS.items():
        one = TypeAdapter(kind).json_schema()
        one["properties"]["method"] = {"const": name}
        if hasattr(kind, "defaults"):
            one["properties"]["training"] = {"$ref": "#/$defs/TrainingSettings"}
            one["properties"]["tasks"] = {"type": "array", "items": {"type": "string"}}
            one["properties"]["replay"] = {"$ref": "#/$defs/Replay"}
        tuned.append(one)
    definitions["Tuning"] = {"anyOf": [*tuned, {"type": "null"}]}
    properties = schema["properties"]
    names = sorted(task_files())
    properties["base"] = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/BaseSpec"}]}
    task = {"anyOf": [{"enum": names}, {"type": "string"}, {"$ref": "#/$defs/Task"}]}
    either = {"anyOf": [*task["anyOf"], {"$ref": "#/$defs/Mixture"}]}
    preset = {"const": "flan2022", "description": "FLAN 2022's weights, caps and forms over `sources`."}
    sources = {"type": "object", "additionalProperties": {"type": "array", "items": either}}
    definitions["Mixture"]["properties"] |= {"preset": preset, "sources": sources}
    definitions["Mixture"]["required"] = []
    definitions["Mixture"]["anyOf"] = [{"required": ["tasks"]}, {"required": ["preset", "sources"]}]
    definitions["Mixture"]["properties"]["tasks"]["items"] = {"anyOf": [*either["anyOf"], {"$ref": "#/$defs/Member"}]}
    definitions["Member"]["properties"]["task"] = either
    definitions["Replay"]["properties"]["task"] = task
    properties["task"] = either
    properties["retention"] = {"type": "array", "items": task, "default": RETENTION}
    properties["tunings"] = {
        "anyOf": [
            {"type": "object", "additionalProperties": {"$ref": "#/$defs/Tuning"}},
            {"type": "array", "items": {"enum": list(METHODS)}},
        ]
    }
    file = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Source"}]}
    definitions["Task"]["properties"]["train"] = file
    definitions["Task"]["properties"]["metrics"]["items"] = {"enum": [*METRICS, *MODEL_METRICS]}
    for split in ("validation", "test"):
        definitions["Task"]["properties"][split] = {"anyOf": [*file["anyOf"], {"type": "number"}], "default": 0.1}
    return schema
