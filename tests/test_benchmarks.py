"""What a benchmark prints and writes follows from what it measured; nothing is trained here."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
MINE = {"rate": 900.0, "peak_bytes": 2.0e9, "loss": 1.515, "loss_start": 2.3, "steps": 12}
THEIRS = {"rate": 150.0, "peak_bytes": 8.0e9, "loss": 1.5, "steps": 12}


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def test_an_entry_has_the_agreed_keys_and_ratios() -> None:
    from training.table import entry, median

    theirs = median([THEIRS, THEIRS | {"rate": 100.0}, THEIRS | {"rate": 400.0}])
    one = entry("lora", "trl as installed", theirs, MINE, MINE | {"rate": 1200.0, "peak_bytes": 1.0e9})
    assert json.loads(json.dumps(one)) == one
    assert {"job", "peer", "peer_value", "ours", "speed_ratio", "memory_ratio", "loss_peer", "loss_ours"} <= one.keys()
    assert (one["peer_value"], one["ours"], one["speed_ratio"], one["memory_ratio"]) == (150.0, 900.0, 6.0, 0.25)
    assert (one["speed_ratio_tcmalloc"], one["memory_ratio_tcmalloc"]) == (8.0, 0.125)
    assert one["loss_equal"] is True


def test_losses_further_apart_than_two_percent_are_marked() -> None:
    from training.table import entry, table

    fair = entry("lora", "trainer as installed", THEIRS, MINE)
    unfair = entry("lora", "trainer batch 4 grouped, tcmalloc", THEIRS, MINE | {"loss": 1.46})
    alone = entry("bottleneck", None, None, MINE)
    assert (fair["loss_equal"], unfair["loss_equal"], alone["loss_equal"]) == (True, False, None)
    assert alone["speed_ratio"] is None and alone["ours"] == 900.0
    packed = entry("lora", "trl packed 2048, tcmalloc", THEIRS | {"steps": 11}, MINE)
    assert "trl packed 2048, tcmalloc: 11 steps, not 12" in table([packed])
    lines = table([fair, unfair, alone]).splitlines()
    assert [line.endswith("!") for line in lines[1:4]] == [False, True, False]
    assert "not the same training" in lines[-1]
    assert max(map(len, lines)) <= 80


def test_products_are_counted_forward_and_backward() -> None:
    import torch
    from torch.nn import functional as F
    from training.profile import Products, summary, text

    x, w = torch.randn(300, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    with Products() as products:
        F.linear(x, w).sum().backward()  # y, dx and dw
        linear = products.flops
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    assert linear == 3 * 2 * 300 * 64 * 32
    assert products.flops - linear == (4 + 10) * 2 * 16 * 16 * 8
    found = summary(products, 2 * products.seconds, 1.0, torch.float32)
    assert found["product_share"] == 0.5
    assert found["achieved_fraction"] == pytest.approx(products.flops / found["product_rate_alone"])
    assert max(map(len, text(found).splitlines())) <= 80


def test_sides_are_measured_in_turn_and_the_best_way_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything once; then what is compared again, one side after another, so that a slow minute is everybody's."""
    import argparse
    from types import SimpleNamespace

    import train
    from training.sides import AS_INSTALLED

    asked: list[tuple[str, str, str]] = []

    def measure(self: train.Bench, run: train.Run) -> dict[str, float] | None:
        asked.append((run.side, str(run.way), run.own))
        rate = {"luthier": 900.0, "trainer": 100.0 if run.way == AS_INSTALLED else 300.0}[run.side] + len(asked)
        return None if len(asked) == 8 else MINE | {"rate": rate}

    bench, less = object.__new__(train.Bench), '{"gradient_checkpointing": true}'
    bench.given = argparse.Namespace(
        job="lora", repeats=3, ways="batch 2 grouped", dtype="bfloat16", device="cpu", rows=8, best_only=False
    )
    bench.job, bench.rows, bench.modes, bench.own = SimpleNamespace(note=""), Path(), [False], ["{}", less]
    monkeypatch.setattr(train.Bench, "measure", measure)
    monkeypatch.setattr(train.Bench, "peers", lambda self: ["trainer"])
    monkeypatch.setattr(train, "read_rows", lambda path: ([], []))
    results = bench.compare()
    assert asked == 3 * [
        ("luthier", "batch 8", "{}"), ("luthier", "batch 8", less),
        ("trainer", "batch 8", "{}"), ("trainer", "batch 2 grouped", "{}"),
    ]  # fmt: skip
    named = [("trainer as installed", False), ("trainer batch 2 grouped", True)]
    assert [(one["peer"], one["best"]) for one in results] == named * 2
    assert [one["training"] for one in results] == [{}, {}, json.loads(less), json.loads(less)]
    assert [one["peer_value"] for one in results] == [107.0, 308.0] * 2  # of 103, 107, 111; of 304, (failed), 312
    assert [one["ours"] for one in results] == [905.0, 905.0, 906.0, 906.0]
    bench.given.best_only, bench.given.repeats = True, 1
    assert [one["peer"] for one in bench.compare()] == ["trainer batch 2 grouped"] * 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nonsense", "'nonsense' is no JSON"),
        ("[1]", "'[1]' must be an object"),
        ('{"epochs": 3}', "epochs is none of gradient_checkpointing, micro_batch_tokens"),
    ],
)
def test_settings_that_are_none_are_refused(
    given: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train

    monkeypatch.setattr("sys.argv", ["train.py", "--training", given])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert said in capsys.readouterr().err
