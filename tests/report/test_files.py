"""report.md and report.csv hold the page's numbers, and survive any text."""

import csv
import io
import re
from itertools import product

import pytest
from rich.console import Console
from tests.report.reports import HOSTILE, rich, score

from luthier.report.charts import Bar, bars
from luthier.report.cost_tables import disk_table
from luthier.report.markdown import markdown
from luthier.report.scatter import Point, scatter
from luthier.report.spreadsheet import COLUMNS, spreadsheet
from luthier.report.table import print_report


def test_markdown_tables_are_whole_and_hold_no_markup() -> None:
    text = markdown(rich())
    assert text.startswith("# both on tiny\n\nr8 is the smallest tuning")
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table[:300]
    assert not re.search(r"(?<!\\)<", text) and HOSTILE not in text
    assert "| r8 (lora) | 30.0 (26.0 to 34.0) |" in text
    for heading in (
        "The tunings",
        "Each task",
        "Pairs",
        "Forgetting",
        "The mixture of r8",
        "Disk",
        "Warnings",
        "How it",
    ):
        assert f"## {heading}" in text


def test_csv_has_a_row_for_each_tuning_task_and_metric() -> None:
    report = rich()
    rows = list(csv.DictReader(io.StringIO(spreadsheet(report))))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 8 * 3 * 2 + 1 + 2
    row = next(one for one in rows if (one["tuning"], one["task"], one["metric"]) == ("r8", "both", "rougeLsum"))
    score = report.tunings["r8"].scores["both"]["rougeLsum"]
    assert [float(row[key]) for key in ("value", "low", "high")] == [score.value, score.low, score.high]
    assert (row["n"], row["file_bytes"], row["base"], row["signature"]) == ("40", "400000", "tiny", score.signature)
    assert {one["tuning"] for one in rows[-3:]} == {"(base)", "(human)"}


def test_disk_is_one_base_and_a_file_a_task() -> None:
    found = {row[0].text: [cell.value for cell in row[1:]] for row in disk_table(rich()).rows}
    base = 134_515_008 * 2
    assert found["r8"] == [base + 400_000 * tasks for tasks in (1, 10, 100)]
    assert found["a merged model a task"] == [base * tasks for tasks in (1, 10, 100)]
    assert "zero_shot" not in found


def test_a_negative_score_has_its_bar_on_the_other_side() -> None:
    drawn = bars([Bar(0, "a", -30.0, -40.0, -20.0), Bar(1, "b", 30.0, 20.0, 40.0)], "matthews")
    (a, wide_a), (b, wide_b) = (
        map(float, one) for one in re.findall(r'<rect [^>]*?x="([\d.]+)" y="\d+" width="([\d.]+)"', drawn)
    )
    assert a + wide_a == pytest.approx(b, abs=0.2) and wide_a == pytest.approx(wide_b, abs=0.2)


def test_costs_of_nothing_and_of_one_size_have_a_place() -> None:
    points = [Point(0, "none", 0, 20, 18, 22), Point(1, "a", 500, 30, 28, 32), Point(2, "b", 500, 35, 33, 37)]
    drawn = scatter(points, "t", "x", "y", lambda cost: f"{cost:.0f} B")
    assert ">none</text>" in drawn and ">500 B</text>" in drawn and "nan" not in drawn
    places = [float(one) for one in re.findall(r"translate\(([\d.]+) ", drawn.split("</svg>")[0])]
    assert places[0] < places[1] < places[2], "marks of one cost stand beside each other"
    assert scatter(points[1:], "t", "x", "y", str) == "", "one cost alone says nothing"


@pytest.mark.parametrize(("lower", "ends"), [(False, 35), (True, 20)])
def test_the_frontier_follows_what_is_better(lower: bool, ends: int) -> None:
    points = [Point(0, "cheap", 10, 30, 30, 30), Point(1, "dear", 1000, ends, ends, ends)]
    front = re.search(r'class="front" d="([^"]*)"', scatter(points, "t", "x", "y", str, lower_is_better=lower))
    assert front and front[1].count("V") == 1
    worse = re.search(r'class="front" d="([^"]*)"', scatter(points, "t", "x", "y", str, lower_is_better=not lower))
    assert worse and worse[1].count("V") == 0


def test_many_tasks_of_many_tunings_fit_the_terminal() -> None:
    report = rich(tuple(f"only_entailment_{place}" for place in range(8)))
    tasks = ["sentiment", "emotion", "news", "entailment", "science"]
    values = {(name, task): 0.1 + place / 100 for place, (name, task) in enumerate(product(report.tunings, tasks))}
    for name, tuning in report.tunings.items():
        tuning.scores |= {task: {"accuracy": score(values[name, task], "accuracy")} for task in tasks}
    console = Console(file=io.StringIO(), width=80)
    print_report(report.model_copy(update={"tasks": tasks, "human": {}}), console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for name in report.tunings:
        told = " ".join(line for line in lines if line.startswith(f"\u2502 {name} "))
        assert all(f" {values[name, task] * 100:.1f} " in told for task in tasks), (name, told)
