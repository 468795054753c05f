"""Templates from outside: what they may do, and what stops them."""

import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from luthier.data.formats.promptsource import read_templates
from luthier.data.library import template_files
from luthier.data.template import Template
from luthier.data.worker import RenderWorker
from luthier.errors import UserError


def test_the_worker_renders_as_the_template_does() -> None:
    template = Template(
        "{{ ['a', 'b', 'c'] | choice }} {{ t }} ||| {{ answer_choices[1] }}", "no ||| yes", strict=False
    )
    with RenderWorker() as worker:
        for seed in range(5):
            row = {"t": f"x ||| é {seed}"}
            assert worker.parts(template, row, "row", seed=seed) == (
                template.parts(row, "row", seed=seed),
                ["no", "yes"],
            )


def test_what_json_has_not_renders_as_without_the_worker() -> None:
    template = Template("{{ when }} {{ raw }} ||| x", strict=False)
    row = {"when": datetime(2020, 1, 2), "raw": b"x"}
    with RenderWorker() as worker:
        assert worker.parts(template, row, "row")[0] == template.parts(row, "row")
        deep: list = []
        for _ in range(100_000):
            deep = [deep]
        with pytest.raises(UserError, match="row 3: .*nested too deeply"):
            worker.parts(template, {"when": deep}, "row 3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %} ||| x", "did not finish within 1 seconds"),
        ("{{ 'x' * 99999999999 }} ||| x", "MiB|MemoryError|Overflow"),
        ("{% set ns = namespace(s='x' * 9999) %}{% for a in range(99999) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %} ||| x", "MiB|did not finish"),
        ("{{ 'x' * 5000000 }} ||| x", "characters"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }} ||| x", "not allowed|lacks"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }} ||| x", "not allowed|lacks"),
        ("{{ lipsum.__globals__['os'] }} ||| x", "not allowed|lacks"),
        ("{{ t | nosuch }} ||| x", "No filter named 'nosuch'"),
    ],
)  # fmt: skip
def test_hostile_and_broken_templates_end_in_a_message(text: str, message: str) -> None:
    started = time.monotonic()
    with RenderWorker(seconds=1) as worker:
        with pytest.raises(UserError, match=message):
            worker.parts(Template(text, strict=False), {"t": "x"}, "row 7")
        assert time.monotonic() - started < 10
        fine = Template("{{ t }} ||| y", strict=False)
        assert worker.parts(fine, {"t": "ok"}, "row")[0] == ["ok", "y"], "the next row must still render"


def luthier(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "luthier.cli", "templates", *arguments], capture_output=True, text=True
    )


def test_the_command_lists_and_renders(tmp_path: Path) -> None:
    listed = luthier("list").stdout
    assert "dialogue:" in listed
    assert "  headline" in listed
    row = tmp_path / "row.json"
    row.write_text(json.dumps({"dialogue": "A: hi", "summary": "A greets."}))
    done = luthier("render", "dialogue", "summarize", "--row", str(row), "--json")
    assert json.loads(done.stdout) == {
        "parts": ["Summarize the following conversation.\n\nA: hi", "A greets."], "answer_choices": None,
    }  # fmt: skip
    shown = luthier("render", "dialogue", "summarize", "--row", str(row)).stdout
    assert "A: hi" in shown
    assert "completion" in shown
    wrong = luthier("render", "dialogue", "sumarize", "--row", str(row))
    assert wrong.returncode == 2
    assert "Did you mean 'summarize'" in wrong.stderr
    assert luthier("render", str(tmp_path / "no.yaml"), "x", "--row", str(row)).returncode == 2


def test_the_shipped_templates_fit_the_shipped_rows() -> None:
    from luthier.data.library import FOLDER

    files = template_files()
    dialogue, review = read_templates(files["dialogue"]), read_templates(files["review"])
    assert sum("summary" in entry.template.text.split("|||")[1] for entry in dialogue.values()) >= 7
    rows = {
        "dialogue": json.loads((FOLDER / "support-dialogues/train.jsonl").read_text(encoding="utf-8").split("\n")[0]),
        "review": json.loads((FOLDER / "product-reviews/train.jsonl").read_text(encoding="utf-8").split("\n")[0]),
    }
    for name, entries in (("dialogue", dialogue), ("review", review)):
        for entry in entries.values():
            prompt, completion = entry.template.parts(rows[name], "row")
            assert prompt
            assert completion
            if choices := entry.template.choices(rows[name], "row"):
                assert completion in choices
