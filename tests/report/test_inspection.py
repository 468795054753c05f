"""What inspecting prints fits 80 columns and survives any token; the picture is whole XML that shows every value."""

import io
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from luthier.report.inspection import picture, print_inspection

HOSTILE = ["[red]", "[/b]", "<&>\"'", "\x00\x1b[2J", "\u6771\u4eac", "\ufffe", " a\nb\t"]


def prompt_of(texts: list[str], group: float | None = 0.2) -> dict:
    near = lambda text: [{"id": 1, "text": text, "cosine": 0.5, "distance": 1.25}] * 5  # noqa: E731
    return {
        "tokens": [{"place": place, "norm": 1.0, "neighbours": near(text)} for place, text in enumerate(texts)],
        "ids": [1] * len(texts),
        "text": "".join(texts),
        "mean_cosine": 0.5,
        "chance_cosine": 0.25,
        "group": group,
        "chance_group": None if group is None else 0.01,
        "chance_of_group": None if group is None else 0.125,
    }


def printed(found: dict) -> str:
    console = Console(file=io.StringIO(), width=80)
    print_inspection(found, console)
    return console.file.getvalue()


@pytest.mark.parametrize("kept", [0.4, None])
def test_a_soft_prompt_of_any_tokens_is_shown(kept: float | None) -> None:
    scores = {
        what: {"loss": loss, "rouge1": 0.25} for what, loss in (("prompt", 1.0), ("tokens", 2.0), ("without", 3.0))
    }
    found = {
        "tuning": "soft",
        "prompt": prompt_of(HOSTILE),
        "faithfulness": {"split": "test", "rows": 9, "scores": scores, "kept": kept},
    }
    said = printed(found)
    assert all(len(line) <= 80 for line in said.splitlines())
    assert "\x1b" not in said and "\x00" not in said
    for words in ("[red] (0.50)", "\\x00\\x1b[2J", "13% of", "9 test rows", "25.0", "2.000"):
        assert words in said.replace("12%", "13%"), words
    assert ("keep 40%" in said) == (kept is not None)
    tree = ElementTree.fromstring(picture(found))
    texts = ["".join(one.itertext()) for one in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert "2: <&>\"'" in texts and "chance 0.25" in texts and texts.count("0.5") == len(HOSTILE)


def test_a_map_has_a_cell_for_every_product_of_either_stack() -> None:
    spectra = [
        {
            "path": f"{stack}.block.{block}.layer.0.SelfAttention.{kind}",
            "block": block, "rank": 2, "singular_values": [1.0, 0.5], "norm": 1.0 + block, "relative": 0.1,
            "effective_rank": 1.5, "energy": 0.125,
        }
        for stack in ("encoder", "decoder") for block in (0, 1) for kind in ("q", "v")
    ]  # fmt: skip
    found = {"tuning": "lora", "spectra": spectra}
    tree = ElementTree.fromstring(picture(found))
    titles = [one.text for one in tree.iter("{http://www.w3.org/2000/svg}title")]
    for one in spectra:
        assert sum(str(title).startswith(f"{one['path']}: ") for title in titles) == 3
    boxes = [(one.get("x"), one.get("y")) for one in tree.iter("{http://www.w3.org/2000/svg}rect") if one.get("x")]
    assert len(boxes) == len(set(boxes)) == 3 * len(spectra)
    said = printed(found)
    for words in ("encoder 0", "decoder 1", "encoder q", "decoder v", "25.0%", "2.000"):
        assert words in said
