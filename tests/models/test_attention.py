"""Rows attended in one padded call, as an accelerator does, against each row on its own."""

import pytest
import torch

from luthier.models.attention import Packing, _as_one_call, _together, packed_attention


def test_one_padded_call_equals_a_call_for_each_row() -> None:
    packing, count = Packing((3, 7, 1, 5)), 16
    inputs = [torch.randn(1, heads, count, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    upstream = torch.randn(1, count, 4, 8, dtype=torch.float64)

    def run(attend):
        out = attend(*inputs)
        return [out, *torch.autograd.grad(out, inputs, upstream)]

    together = run(lambda q, k, v: _together(q, k, v, packing, 0.3, 0.0))
    apart = run(lambda q, k, v: packed_attention(None, q, k, v, scaling=0.3, packing=packing)[0])
    for found, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("packing", "where", "softcap", "window", "expected"),
    [
        (Packing((5, 6)), "cuda", None, None, True),
        (Packing((5, 6)), "cuda", None, 6, True),
        (Packing((5, 6)), "cuda", None, 5, False),  # the window hides something
        (Packing((5, 6)), "cuda", 2.0, None, False),
        (Packing((5, 6)), "cpu", None, None, False),
        (Packing((11,)), "cuda", None, None, False),
        (Packing((1, 1, 1, 20)), "cuda", None, None, False),  # mostly padding
        (Packing((5, 6), ((), (2, 2))), "cuda", None, None, False),
        (Packing((5, 6), ((), ())), "cuda", None, None, True),
    ],
)
def test_when_rows_share_a_call(packing, where, softcap, window, expected) -> None:
    assert _as_one_call(packing, where, softcap, window) == expected
