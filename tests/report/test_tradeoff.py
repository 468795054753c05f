"""What a score costs: the matched score and the changes there are read off the ways by hand."""

import pytest
from tests.report.reports import rich, score, tuning

from luthier.report.markdown import markdown
from luthier.report.page import page
from luthier.report.schema import Report, Retention, Snapshot
from luthier.report.tradeoff import matched_score, matched_table, tradeoff_charts, ways


def scores(main: float, topics: float) -> dict:
    own = {
        task: {metric: score(main, metric) for metric in ("rouge1", "rougeLsum")}
        for task in ("summary", "topic", "both")
    }
    return {**own, "topics": {"accuracy": score(topics, "accuracy")}}


def report() -> Report:
    made = rich(("zero_shot", "one_shot", "lora", "full"))
    made.tunings["zero_shot"] = tuning(0, scores=scores(0.20, 0.60))
    made.tunings["lora"] = tuning(
        2, steps=30, scores=scores(0.34, 0.50),
        snapshots=[Snapshot(step=20, scores=scores(0.30, 0.52)), Snapshot(step=10, scores=scores(0.26, 0.58))],
    )  # fmt: skip
    made.tunings["full"] = tuning(
        3, steps=30, scores=scores(0.32, 0.30), snapshots=[Snapshot(step=15, scores=scores(0.28, 0.40))]
    )
    made.tunings["full_50"] = tuning(
        3, method="interpolate", settings={"of": "full", "share": 0.5}, scores=scores(0.31, 0.56)
    )
    made.retention = [
        Retention(
            task="topics", tuning=name, metric="accuracy", before=score(0.6, "accuracy"), after=made.tunings[name].scores["topics"]["accuracy"],
            difference=0.0, low=0.0, high=0.0,
        )
        for name in ("lora", "full", "full_50")
    ]  # fmt: skip
    return made


def test_ways_lead_from_the_base_through_what_was_scored() -> None:
    found = {
        way.name: [(point.where, point.score, point.kept["topics"]) for point in way.points] for way in ways(report())
    }
    assert found == {
        "lora": [(0, 0.20, 0.60), (10, 0.26, 0.58), (20, 0.30, 0.52), (30, 0.34, 0.50)],
        "full": [(0, 0.20, 0.60), (15, 0.28, 0.40), (30, 0.32, 0.30)],
        "full, interpolated": [(0, 0.20, 0.60), (0.5, 0.31, 0.56), (1, 0.32, 0.30)],
    }


def test_forgetting_is_read_where_all_first_reached_one_score() -> None:
    found = report()
    assert matched_score(found) == 0.32, "the best of the worst of them"
    rows = {row[0].text: row for row in matched_table(found).rows}
    assert rows["lora"][1].text == "step 25" and rows["lora"][2].value == pytest.approx(0.51 - 0.60)
    assert rows["full"][1].text == "step 30" and rows["full"][2].value == pytest.approx(0.30 - 0.60)
    assert rows["full, interpolated"][1].text == "100% of the change"
    shown = page(found)
    assert "Where each first reached rougeLsum 32.0" in shown and "topics (accuracy) against rougeLsum" in shown
    assert "| lora | step 25 | -9.0 |" in markdown(found)


def test_a_metric_that_falls_is_reached_from_above() -> None:
    found = report()
    found.metric = "loss"
    for one in found.tunings.values():
        for every in (one, *one.snapshots):
            if "rougeLsum" in every.scores["both"]:
                every.scores["both"] = {"loss": score(3 - every.scores["both"]["rougeLsum"].value, "loss")}
    assert matched_score(found) == pytest.approx(3 - 0.32)
    assert {row[0].text: row[1].text for row in matched_table(found).rows}["lora"] == "step 25"


def test_nothing_is_said_where_nothing_was_kept() -> None:
    found = rich()
    assert (
        ways(found) == [] and matched_score(found) is None and not matched_table(found) and tradeoff_charts(found) == []
    )
    assert "What a score costs" not in page(found) and "What a score costs" not in markdown(found)
    alone = report()
    del alone.tunings["full_50"]
    alone.tunings["full"].snapshots = []
    assert len(ways(alone)) == 1 and not matched_table(alone), "one alone is matched with nothing"
    assert len(tradeoff_charts(alone)) == 1
