"""Every method has a page that names its settings, its laws with their reasons, and its rate."""

from dataclasses import fields
from pathlib import Path

import pytest

from luthier.tuning import METHODS, LoRA

PAGES = Path(__file__).parents[2] / "docs" / "methods"


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_page_says_what_the_code_does(name: str) -> None:
    page, kind = (PAGES / f"{name}.md").read_text(encoding="utf-8"), METHODS[name]
    assert page.startswith(f"# {name}\n")
    for one in fields(kind):  # type: ignore[arg-type]
        assert f"`{one.name}`" in page, f"{one.name} is not on the page"
    if not hasattr(kind, "laws"):
        return
    variants = [kind()] + ([LoRA(modules_to_save=["lm_head"])] if kind is LoRA else [])
    for method in variants:
        for law in vars(method.laws).values():
            assert f"| {'yes' if law.holds else 'no'} | {law.why} |" in page
        rate = f"{method.defaults.learning_rate:.0e}".replace("e-0", "e-")
        assert f"learning rate is {rate}" in page.replace("\n", " ")
        assert f"`{kind.peft_type}`" in page if hasattr(kind, "peft_type") else "PEFT has no such type" in page
