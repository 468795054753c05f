"""Rows attended in one padded call, as an accelerator does, against each row on its own."""

import pytest
import torch
from tests.tiny import DEVICE

from luthier.models import attention
from luthier.models import packing as packing_module
from luthier.models.attended import attend
from luthier.models.attention import _as_one_call, _by_lengths, _flash_runs, _together, attended_by, packed_attention
from luthier.models.packing import Packing


def test_one_padded_call_equals_a_call_for_each_row() -> None:
    packing, count = Packing((3, 7, 1, 5)), 16
    inputs = [torch.randn(1, heads, count, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    upstream = torch.randn(1, count, 4, 8, dtype=torch.float64)

    def run(attended):
        out = attended(*inputs)
        return [out, *torch.autograd.grad(out, inputs, upstream)]

    together = run(lambda q, k, v: _together(q, k, v, packing, 0.3, 0.0))
    apart = run(lambda q, k, v: packed_attention(None, q, k, v, scaling=0.3, packing=packing)[0])
    for found, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.skipif(
    str(DEVICE) != "cuda", reason="the kernel that takes lengths runs on CUDA (LUTHIER_TEST_DEVICE=cuda)"
)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("lengths", [(3, 70, 1, 54), (128,)])
def test_the_kernel_that_takes_lengths_equals_a_call_for_each_row(lengths: tuple[int, ...], window: int | None) -> None:
    """In bfloat16, against float32: within what 8 bits of mantissa leave."""
    packing = Packing(lengths)
    inputs = [
        torch.randn(1, heads, 128, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for heads in (4, 2, 2)
    ]
    upstream = torch.randn(1, 128, 4, 64, device=DEVICE, dtype=torch.bfloat16)
    assert _by_lengths(packing, "cuda", torch.bfloat16, None, 0.0)

    def run(dtype):
        out, _ = packed_attention(
            None, *(one.to(dtype) for one in inputs), scaling=0.1, packing=packing, sliding_window=window
        )
        return [out, *torch.autograd.grad(out, inputs, upstream.to(dtype))]

    for found, expected in zip(run(torch.bfloat16), run(torch.float32), strict=True):
        torch.testing.assert_close(found.float(), expected.float(), atol=0.03, rtol=0.03)


@pytest.mark.parametrize(
    ("capability", "width", "expected"),
    [((8, 0), 64, True), ((9, 0), 256, True), ((8, 0), 257, False), ((7, 5), 64, False), (None, 64, False)],
)
def test_where_flash_attention_runs(
    capability: tuple[int, int] | None, width: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert _flash_runs(width) == expected


@pytest.mark.parametrize(
    ("packing", "where", "dtype", "softcap", "dropout", "expected"),
    [
        (Packing((5, 6)), "cuda", torch.bfloat16, None, 0.0, True),
        (Packing((11,)), "cuda", torch.float16, None, 0.0, True),
        (Packing((5, 6)), "cuda", torch.float32, None, 0.0, False),
        (Packing((5, 6)), "cpu", torch.bfloat16, None, 0.0, False),
        (Packing((5, 6)), "cuda", torch.bfloat16, 2.0, 0.0, False),
        (Packing((5, 6)), "cuda", torch.bfloat16, None, 0.1, False),
        (Packing((5, 6), ((), (2, 2))), "cuda", torch.bfloat16, None, 0.0, False),
    ],
)
def test_when_the_kernel_takes_lengths(packing, where, dtype, softcap, dropout, expected) -> None:
    assert _by_lengths(packing, where, dtype, softcap, dropout) == expected


@pytest.mark.parametrize("rows", [((3, 7, 6),), ((3, 13), ((), (4, 5, 1)))], ids=["rows", "forked"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("part", [3, 128])
def test_the_gradient_written_out_is_autograds(rows: tuple, window: int | None, part: int, monkeypatch) -> None:
    inputs = [torch.randn(1, heads, 16, 8, requires_grad=True) for heads in (4, 2, 2)]
    upstream = torch.randn(1, 16, 4, 8)
    monkeypatch.setattr(packing_module, "PART", part)
    packing = Packing(*rows)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_is_explicit", lambda *_: True)
        attended = attended_by(packing, window, 0.3, inputs[0], 8)
    assert (len(attended.pieces) > len(packing.pieces)) == (part == 3)
    found = attend(*inputs, attended)
    expected, _ = packed_attention(None, *inputs, scaling=0.3, packing=packing, sliding_window=window)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    gradients = [torch.autograd.grad(out, inputs, upstream) for out in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_a_branch_sees_the_shared_part_and_itself(window: int | None) -> None:
    """Each branch behind the shared part is a row of its own."""
    forked, shared, branches = Packing((15,), ((4, 5, 1),)), 5, (4, 5, 1)
    inputs = [torch.randn(1, heads, 15, 8) for heads in (4, 2, 2)]
    out, _ = packed_attention(None, *inputs, scaling=0.3, packing=forked, sliding_window=window)
    start = shared
    for branch in branches:
        places = [*range(shared), *range(start, start + branch)]
        alone, _ = packed_attention(
            None,
            *(one[:, :, places] for one in inputs),
            scaling=0.3,
            packing=Packing((len(places),)),
            sliding_window=window,
        )
        torch.testing.assert_close(out[:, start : start + branch], alone[:, shared:], atol=1e-6, rtol=1e-5)
        start += branch


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
