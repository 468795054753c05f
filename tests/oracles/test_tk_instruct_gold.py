"""Super-NaturalInstructions prompts equal Tk-Instruct's own collator at every length limit."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from luthier.data.formats.superni import TkInstruct, build_source


def test_every_source_equals_the_collators(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "t5-tokenizer")

    def head(text: str, limit: int) -> str:
        ids = tokenizer(text).input_ids[:limit]
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    cases = [json.loads(line) for line in (shared / "gold" / "tk_instruct.jsonl").read_text().split("\n") if line]
    assert len(cases) == 198
    for case in cases:
        asked = case["encoding_args"]
        form = TkInstruct(
            name=asked["add_task_name"],
            definition=asked["add_task_definition"],
            positives=asked["num_pos_examples"],
            negatives=asked["num_neg_examples"],
            explanations=asked["add_explanation"],
        )
        count = lambda text: len(tokenizer(text).input_ids)  # noqa: E731
        found = build_source(case["instance"], form, case["max_source_length"], count, head)
        note = f"{case['task']} {case['instance_index']} {case['encoding']} {case['max_source_length']}"
        assert (found.positives, found.negatives, found.truncated) == (
            case["n_pos_kept"], case["n_neg_kept"], case["truncated"],
        ), note  # fmt: skip
        assert found.text == case.get("expected_source_no_cleanup", case["expected_source"]), note
