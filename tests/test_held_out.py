"""Held-out rows are those of the run, cut as they were when it was trained."""

import json
from pathlib import Path

from luthier.held_out import held_out
from luthier.recipe_file import make_recipe
from tests import tiny


def test_prompts_keep_within_their_templates_limit(tmp_path: Path) -> None:
    base = tiny.make("llama")
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    instances = [{"input": f"row {number} " + "of many words " * 40, "output": ["yes"]} for number in range(8)]
    whole = {"Definition": ["Say yes."], "Positive Examples": [], "Negative Examples": [], "Instances": instances}
    (tmp_path / "task.json").write_text(json.dumps(whole))
    task = {"train": "task.json", "template": "tk-instruct:def@32", "validation": 2, "test": 2}
    recipe = make_recipe({"base": str(tmp_path / "base"), "task": task, "tunings": ["lora"], "data": str(tmp_path)})
    split, [(found, rows)] = held_out(recipe, "lora", 2)
    assert split == "validation" and list(rows) == list(recipe.examples(found).validation)
    assert all(len(base.tokenizer(row.prompt).input_ids) <= 34 for row in rows)
