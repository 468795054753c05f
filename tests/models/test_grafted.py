"""A grafted module: the loop that is its meaning, by traffic; and one tuning pays nothing extra."""

import pytest
import torch
from torch import Tensor, nn

from luthier.models.grafted import Delta, Grafted, Route

WIDTH = 4


class Recorder(nn.Module):
    """A base that remembers what it read and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.calls.append((x, y))
        return y


class Plus(Delta):
    def __init__(self, by: float):
        super().__init__()
        self.by = by

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.by * x


class Times(Delta):
    changes_input = True

    def __init__(self, by: float):
        super().__init__()
        self.by = by

    def enter(self, x: Tensor) -> Tensor:
        return x * self.by

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y - 1


def grafted() -> tuple[Grafted, Recorder, Route]:
    base, route = Recorder(), Route()
    module = Grafted(base, route)
    for name, delta in {"a": Plus(2.0), "b": Times(3.0), "c": Plus(-1.0)}.items():
        module.add(name, delta)
    return module, base, route


@pytest.mark.parametrize("name", [None, "elsewhere", "a"])
def test_one_tuning_is_one_call_of_the_base_on_the_very_input(name: str | None) -> None:
    module, base, route = grafted()
    route.one(name)
    x = torch.randn(1, 7, WIDTH)
    out = module(x)
    assert len(base.calls) == 1 and base.calls[0][0] is x
    assert (out is base.calls[0][1]) == (name != "a"), "where nothing is grafted the base's output passes as it is"


# How many rows each tuning has: one for all, each its own, even, most for one, and odd sizes.
TRAFFIC: dict[str, list[tuple[str | None, int]]] = {
    "identical": [("a", 7)],
    "distinct": [("a", 1), (None, 1), ("b", 1), ("c", 1), ("elsewhere", 1)],
    "uniform": [("a", 3), ("b", 3), ("c", 3), (None, 3)],
    "skewed": [("b", 29), ("a", 1), ("c", 1)],
    "base only": [(None, 4), ("elsewhere", 3)],
    "large": [("c", 64), ("b", 69)],
}


@pytest.mark.parametrize("layout", ["packed", "padded", "flat", "flattened"])
@pytest.mark.parametrize("traffic", TRAFFIC)
def test_segments_are_a_loop_over_rows(traffic: str, layout: str) -> None:
    """y[s] = f_t(x[s], base(e_t(x))[s]): each row as if its tuning had it alone."""
    module, base, route = grafted()
    rows = [name for name, count in TRAFFIC[traffic] for _ in range(count)]
    # packed (1, T, D); padded (rows, L, D); flat (rows, D); flattened (rows x L, D), as some blocks do inside
    length = {"packed": 1, "padded": 5, "flat": 1, "flattened": 5}[layout]
    x = torch.randn(len(rows), length, WIDTH)
    shape = {"packed": (1, len(rows), WIDTH), "padded": x.shape}.get(layout, (-1, WIDTH))
    parts, start = [], 0
    for name, count in TRAFFIC[traffic]:
        parts.append((name, slice(start, start + count)))
        start += count
    route.parts, route.axis = tuple(parts), 1 if layout == "packed" else 0
    found = module(x.reshape(shape)).reshape(x.shape)
    assert len(base.calls) == 1, "the base runs once for all"
    for place, name in enumerate(rows):
        route.one(name)
        torch.testing.assert_close(found[place], module(x[place]), atol=1e-6, rtol=1e-6)
