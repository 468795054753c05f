"""The shots curve is made of the report's own scores; the break-even point is that of the formula."""

from statistics import mean, stdev

import pytest
from tests.report.reports import rich, score, tuning

from luthier.report.markdown import markdown
from luthier.report.page import page
from luthier.report.schema import Report, RunReport, Shots
from luthier.report.shots import break_even_table, shots_chart, shots_table


def few(value: float, asked: int, selection: str, tokens: float, held: float | None = None):
    scores = {task: {"rouge1": score(value), "rougeLsum": score(value)} for task in ("summary", "topic", "both")}
    return tuning(
        1, method="few_shot", settings={"method": "few_shot", "selection": selection}, scores=scores, prompt_tokens=tokens,
        shots=Shots(asked=asked, least=asked, mean=asked if held is None else held),
    )  # fmt: skip


def report() -> Report:
    made = rich(("zero_shot", "one_shot", "soft", "lora"))
    made.tunings.pop("one_shot")
    made.tunings |= {
        "two_draw0": few(0.30, 2, "random", 500), "two_draw1": few(0.34, 2, "random", 520),
        "eight": few(0.40, 8, "random", 1400, held=6.5), "near": few(0.36, 8, "similar", 1500),
    }  # fmt: skip
    made.tunings["soft"].method, made.tunings["soft"].settings = "prompt_tuning", {"length": 20}
    return made


def test_the_curve_has_a_row_for_each_number_of_shots() -> None:
    found = report()
    rows = [[cell.text for cell in row] for row in shots_table(found).rows]
    zero = found.tunings["zero_shot"].scores["both"]["rougeLsum"].value * 100
    assert rows == [
        ["0", "-", "1", f"{zero:.1f}", "0.0", "180"],
        ["2", "random", "2", f"{mean([30, 34]):.1f}", "2.0", "510"],
        ["8", "random", "1", "40.0", "6.5", "1400"],
        ["8", "similar", "1", "36.0", "8.0", "1500"],
    ]
    assert shots_table(found).rows[1][3].detail == f"sd {stdev([30, 34]):.1f} over draws"
    drawn = shots_chart(found)
    assert "random" in drawn and "similar" in drawn and "<title" in drawn
    assert "Examples in the prompt" in page(found) and "| 8 | random | 1 | 40.0" in markdown(found)


def test_a_tuning_pays_for_itself_when_the_formula_says() -> None:
    found = report()
    found.tunings["lora"].train_tokens, found.tunings["lora"].prompt_tokens = 10_000, 200.0
    found.tunings["soft"].train_tokens, found.tunings["soft"].prompt_tokens = 10_000, 1390.0
    rows = {row[0].text: row for row in break_even_table(found).rows}
    assert rows.keys() == {"soft", "lora"}, "what trained nothing has nothing to pay back"
    assert rows["lora"][3].text == "1400" and rows["lora"][3].detail == "8 shots, random", (
        "against the best, not the longest"
    )
    assert rows["lora"][4].text == f"{-(-3 * 10_000 // 1200)}"
    assert rows["soft"][2].text == "1410" and rows["soft"][4].text == "-", (
        "its vectors count, and then nothing is saved"
    )


def test_without_shots_there_is_no_section() -> None:
    made = rich(("zero_shot", "one_shot", "lora"))
    assert not shots_table(made) and not break_even_table(made) and shots_chart(made) == ""
    assert "Examples in the prompt" not in page(made) + markdown(made)


@pytest.mark.parametrize("count", [1, 2])
def test_a_curve_needs_three_points(count: int) -> None:
    made = rich(("zero_shot",))
    made.tunings |= {f"few{n}": few(0.3, n, "random", 300.0 * n) for n in range(1, count + 1)}
    assert bool(shots_chart(made)) == (count == 2)


def test_of_several_runs_each_has_its_curve_and_its_best_prompt() -> None:
    one, other = report(), report()
    for name in ("eight", "near", "lora"):
        other.tunings.pop(name)
    tunings = {
        f"{run}/{name}": each.model_copy(update={"run": run})
        for run, made in (("small", one), ("large", other))
        for name, each in made.tunings.items()
    }
    runs = [
        RunReport(name=run, paths=[run], seeds=[0], base=one.base, recipe=one.recipe, environment={}, part=part)
        for part, run in enumerate(("small", "large"))
    ]
    both = one.model_copy(update={"tunings": tunings, "runs": runs})
    rows = [[cell.text for cell in row[:3]] for row in shots_table(both).rows]
    assert rows == [
        ["large", "0", "-"], ["large", "2", "random"],
        ["small", "0", "-"], ["small", "2", "random"], ["small", "8", "random"], ["small", "8", "similar"],
    ]  # fmt: skip
    assert "small random" in shots_chart(both) and "large random" in shots_chart(both)
    held = {row[0].text: row[3].text for row in break_even_table(both).rows}
    assert held == {"small/soft": "1400", "small/lora": "1400", "large/soft": "510"}
    assert page(both).count("Score by number of shots") == 2, "runs on other test examples stand apart"
