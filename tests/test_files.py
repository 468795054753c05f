"""Files are whole, and JSON is JSON."""

import json
from pathlib import Path

from luthier.files import write_json


def test_numbers_that_json_has_not_are_null(tmp_path: Path) -> None:
    value = {"kl": float("inf"), "each": [1.5, float("nan"), (2, float("-inf"))], "name": "x", "count": 3, "none": None}
    write_json(tmp_path / "x.json", value)
    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: f"not JSON: {name}")
    assert found == {"kl": None, "each": [1.5, None, [2, None]], "name": "x", "count": 3, "none": None}
