"""`luthier compare`: seeds become one tuning, bases stand beside each other, and what is not comparable is not compared."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests import tiny

from luthier.cli import app
from luthier.errors import UserError
from luthier.evaluation.bootstrap import over_seeds
from luthier.evaluation.kept import sampled
from luthier.job import run
from luthier.recipe_file import make_recipe
from luthier.report.compare import compare_runs
from luthier.report.runs import short_names
from luthier.report.seeds import _stem

NAMES = ["Anna", "Ben", "Chloe", "Dev"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of two tunings and a retention task; the other runs of these tests are changed copies."""
    folder = tmp_path_factory.mktemp("finished")
    base = tiny.make("llama")
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    rows = [{"text": f"{NAMES[n % 4]} asks about room {n}", "who": NAMES[n % 4]} for n in range(40)]
    for split, part in (("train", rows[:16]), ("test", rows[16:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    task = {
        "template": "Who? {{ text }} ||| {{ who }}",
        "test": "test.jsonl",
        "choices": NAMES,
        "metrics": ["macro_f1", "accuracy"],
    }
    content = {
        "base": {"model": str(folder / "base"), "dtype": "float32"},
        "data": str(folder),
        "task": {**task, "name": "who", "train": "train.jsonl", "validation": 0},
        "retention": [{**task, "name": "kept", "template": "Name: {{ text }} ||| {{ who }}"}],
        "training": {"max_steps": 2, "batch_size": 4},
        "tunings": {"zero_shot": {}, "lora": {"rank": 2}},
        "allow": ["duplicate"],
    }
    run(make_recipe(content), folder / "run", isolate=False)
    return folder / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, correct: float | None = None, seed: int = 0, **report: Any) -> Path:
        """A copy in which `lora` is right on this share of the test rows, with another seed and changed report."""
        folder = tmp_path / name
        shutil.copytree(finished, folder)
        edit(folder / "report.json", lambda found: found.update(report) or found["recipe"].update(seed=seed))
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "seed": seed}))
        if correct is not None:
            values = [float(n < round(24 * correct)) for n in range(24)]
            edit(
                folder / "results" / "lora.json", lambda found: found["scores"]["who"]["values"].update(accuracy=values)
            )
        return folder

    return make


def edit(file: Path, change: Callable[[dict], object]) -> None:
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))


def test_seeds_of_one_recipe_become_one_tuning(copy: Callable[..., Path], tmp_path: Path) -> None:
    paths = [copy(f"demo-{seed}", correct, seed) for seed, correct in enumerate((0.25, 0.5, 1.0))]
    report = compare_runs(paths, tmp_path / "out")
    assert [(one.name, one.seeds) for one in report.runs] == [("demo", [0, 1, 2])]
    assert list(report.tunings) == ["zero_shot", "lora"]
    score = report.tunings["lora"].scores["who"]["accuracy"]
    assert score.value == pytest.approx(np.mean([0.25, 0.5, 1.0]))
    assert score.spread == pytest.approx(np.std([0.25, 0.5, 1.0], ddof=1))
    results = [json.loads((path / "results" / "lora.json").read_text())["scores"] for path in paths]
    whole = over_seeds([sampled(one, "who", "accuracy") for one in results]).interval()
    assert (score.low, score.high) == (whole.low, whole.high)
    assert score.signature.endswith("|seeds:3")
    (pair,) = report.comparisons
    zero = report.tunings["zero_shot"].scores["who"]["accuracy"]
    assert zero.spread == 0.0 and pair.value == pytest.approx(score.value - zero.value)
    assert [one.tuning for one in report.retention] == ["lora"]
    assert report.retention[0].before.value + report.retention[0].difference == pytest.approx(
        report.retention[0].after.value
    )
    assert report.mismatches == []
    page = (tmp_path / "out" / "report.html").read_text()
    assert "mean of seeds 0, 1, 2" in page and "sd 38.2" in page
    rows = list(csv.DictReader((tmp_path / "out" / "report.csv").open()))
    row = next(one for one in rows if (one["tuning"], one["task"], one["metric"]) == ("lora", "who", "accuracy"))
    assert float(row["spread"]) == score.spread


def test_a_seed_that_drew_other_test_examples_is_a_run_of_its_own(copy: Callable[..., Path], tmp_path: Path) -> None:
    paths = [copy("a0"), copy("a1", seed=1)]
    file = paths[1] / "predictions" / "zero_shot.jsonl"
    file.write_text(file.read_text().replace('"id": "', '"id": "other-'))
    report = compare_runs(paths, tmp_path / "out")
    assert [one.name for one in report.runs] == ["a0", "a1"]
    assert {one.tuning for one in report.retention} == {"a0/lora", "a1/lora"}


def test_bases_of_two_sizes_are_compared_and_named(copy: Callable[..., Path], tmp_path: Path, finished: Path) -> None:
    base = json.loads((finished / "report.json").read_text())["base"]
    paths = [copy("small", 0.2), copy("large", 1.0, base={**base, "parameters": 10**9, "fingerprint": "other"})]
    report = compare_runs(paths, tmp_path / "out")
    assert list(report.tunings) == ["small/zero_shot", "small/lora", "large/zero_shot", "large/lora"]
    assert [one.what for one in report.mismatches] == ["base: parameters", "base: fingerprint"]
    assert all(one.comparable for one in report.mismatches)
    assert len(report.comparisons) == 6
    pair = next(one for one in report.comparisons if (one.ours, one.theirs) == ("large/lora", "small/lora"))
    assert pair.value == pytest.approx(1 - round(24 * 0.2) / 24) and pair.low > 0
    same = next(one for one in report.comparisons if (one.ours, one.theirs) == ("large/zero_shot", "small/zero_shot"))
    assert (same.value, same.p) == (0.0, 1.0), "copies of one system"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "accuracy against model size" in page and "base: fingerprint" in page
    rows = list(csv.DictReader((tmp_path / "out" / "report.csv").open()))
    assert {(one["run"], one["base_parameters"]) for one in rows if one["run"]} >= {("large", "1000000000")}
    again = compare_runs(paths, tmp_path / "out")
    assert again == report, "a comparison may be made anew in its place"


@pytest.mark.parametrize("what", ["examples", "signature"])
def test_what_is_not_comparable_is_not_compared(copy: Callable[..., Path], tmp_path: Path, what: str) -> None:
    paths = [copy("a", 0.5), copy("b", 1.0, seed=1)]
    if what == "examples":
        file = paths[1] / "predictions" / "zero_shot.jsonl"
        file.write_text(file.read_text().replace('"references": ["Anna"]', '"references": ["Ada"]'))
    else:
        (paths[1] / "report.json").write_text(
            (paths[1] / "report.json").read_text().replace("accuracy|case:mixed", "accuracy|case:lower")
        )
        edit(paths[1] / "report.json", lambda found: found["recipe"].update(max_length=99))
    report = compare_runs(paths, tmp_path / "out")
    assert {(one.ours, one.theirs) for one in report.comparisons} == {
        ("a/lora", "a/zero_shot"),
        ("b/lora", "b/zero_shot"),
    }
    assert report.answer.startswith("The runs cannot all be compared on who")
    forbidding = [one.what for one in report.mismatches if not one.comparable]
    assert forbidding == [{"examples": "test examples of who", "signature": "signature of accuracy"}[what]]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('<table class="tunings"') == 2, "not in one table"
    assert "## The tunings: a\n" in (tmp_path / "out" / "report.md").read_text()


def test_another_metric_measured_otherwise_is_left_out_and_said(copy: Callable[..., Path], tmp_path: Path) -> None:
    paths = [copy("a", 0.5), copy("b", 1.0, seed=1)]
    file = paths[1] / "report.json"
    file.write_text(
        file.read_text().replace("metric:macro_f1", "metric:macro_f1|v2").replace('"max_length": ', '"max_length": 1')
    )
    report = compare_runs(paths, tmp_path / "out")
    assert len(report.comparisons) == 6, "the main metric is the same"
    assert {tuple(one.scores["who"]) for one in report.tunings.values()} == {("accuracy",)}
    assert [one.what for one in report.mismatches if not one.comparable] == ["signature of macro_f1"]


def test_a_run_of_one_task_is_compared_with_a_mixture_that_holds_it(copy: Callable[..., Path], tmp_path: Path) -> None:
    paths = [copy("mixed", 0.5, task="mix", tasks=["topic", "who"]), copy("alone", 1.0)]
    report = compare_runs(paths, tmp_path / "out")
    assert (report.task, report.tasks, report.metric) == ("who", ["who"], "accuracy")
    assert any((one.ours, one.theirs) == ("alone/lora", "mixed/lora") for one in report.comparisons)


def test_what_cannot_be_compared_is_one_message(copy: Callable[..., Path], tmp_path: Path) -> None:
    one, other = copy("one"), copy("other")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="Give two or more"):
        compare_runs([one], out)
    with pytest.raises(UserError, match="is given twice"):
        compare_runs([one, one.parent / "." / "one"], out)
    with pytest.raises(UserError, match="is no run directory"):
        compare_runs([one, tmp_path], out)
    edit(other / "report.json", lambda found: found.update(task="what", tasks=["what"]))
    with pytest.raises(UserError, match=r"no task in common \(one: who; other: what\)"):
        compare_runs([one, other], out)
    (other / "report.json").write_text("{}")
    with pytest.raises(UserError, match="no report of schema version 1"):
        compare_runs([one, other], out)
    (other / "report.json").unlink()
    with pytest.raises(UserError, match="is unfinished"):
        compare_runs([one, other], out)
    before = sorted(one.iterdir())
    with pytest.raises(UserError, match="is no comparison"):
        compare_runs([one, copy("third")], one)
    assert sorted(one.iterdir()) == before and not out.exists()


def test_the_command_prints_and_writes(copy: Callable[..., Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    paths = [str(copy("a", 0.5)), str(copy("b", 1.0, seed=1, task="who"))]
    done = CliRunner().invoke(app, ["compare", *paths, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert {one.name for one in (tmp_path / "out").iterdir()} == {
        "report.html",
        "report.md",
        "report.csv",
        "report.json",
    }


def test_names_are_short_and_unique() -> None:
    assert short_names([Path("/runs/a"), Path("/runs/b")]) == ["a", "b"]
    assert short_names([Path("/x/a"), Path("/y/a")]) == ["x/a", "y/a"]
    assert _stem(["demo-0", "demo-1", "demo-12"]) == "demo"
    assert _stem(["alone"]) == "alone"
    assert _stem(["x", "y"]) == ""
