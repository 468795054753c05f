"""The kernels against the formulas in float64."""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luthier.models import loss, matmul
from luthier.models.activations import _WRITTEN_OUT
from luthier.models.attended import attend
from luthier.models.kernels import library
from luthier.models.kernels.calls import AdamW, Kernels, kernels_for, why_none
from luthier.models.kernels.fused import Fused
from luthier.models.norms import norm_backward, norm_forward, norm_weight_backward
from luthier.models.packing import Packing, Piece, plan_of
from luthier.models.products import Plain, quicken_linears
from luthier.models.quantize import QuantizedLinear
from luthier.models.rotary import rotate
from luthier.models.scratch import Scratch

FOUND = library.library()
built = pytest.mark.skipif(isinstance(FOUND, str), reason=f"no kernels: {FOUND}")
ROUNDING = 2**-8  # of a number to bfloat16, relative; its half, and as much for an order of sums


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def error(found: Tensor, exact: Tensor) -> float:
    """The largest error of any number, in roundings to bfloat16 of itself and of a typical one, from which sums have cancelled."""
    assert found.shape == exact.shape and found.isfinite().all()
    allowed = ROUNDING * (exact.abs() + exact.std(correction=0)) + 1e-12
    return float(((found.double() - exact).abs() / allowed).max())


@pytest.fixture(scope="module", params=["avx512", "amx"], autouse=True)
def instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    """All of it by the kernels of either set of instructions."""
    if isinstance(FOUND, str):
        yield
        return
    if request.param == "amx" and not library.has_units():
        pytest.skip("the processor has no AMX")
    found = library.load(library.built(os.environ.get("CC") or "gcc", request.param == "amx"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("luthier.models.kernels.calls.library", lambda: found)
        yield


@pytest.fixture
def by_pytorch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing runs by the kernels."""
    monkeypatch.setattr("luthier.models.kernels.calls.library", lambda: "switched off")
    return monkeypatch


@built
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 130),
    inner=st.integers(1, 200).map(lambda half: 2 * half),
    columns=st.integers(1, 150),
    rank=st.sampled_from([0, 1, 2, 3, 8, 18]),
    turned=st.booleans(),
    bias=st.booleans(),
    add=st.booleans(),
)
def test_a_product_is_the_formula(rows, inner, columns, rank, turned, bias, add) -> None:
    x, out = numbers(rows, inner), numbers(rows, columns, seed=1)
    weight = numbers(columns, inner).T if turned else numbers(inner, columns)
    offset = numbers(columns) if bias else None
    thin = (numbers(rows, rank), numbers(rank, columns)) if rank else None
    assert matmul._for_product(x, weight, out, offset) is not None
    exact = x.double() @ weight.double()
    exact += out.double() if add else 0
    exact += 0 if offset is None else offset.double()
    exact += thin[0].double() @ thin[1].double() if thin else 0
    matmul.product(x, weight, out, offset, thin, add)
    assert error(out, exact) <= 1 + rank % 2  # of an odd rank the thin matrix is another pass


@built
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("inner", [2048, 2050, 6000])
@pytest.mark.parametrize("columns", [70, 700])
def test_a_deep_product_is_summed_in_parts(columns: int, inner: int, turned: bool) -> None:
    """As the others; numbers are rounded once, at the end. 700 columns are several groups of panels."""
    x, out = numbers(45, inner), numbers(45, columns, seed=1)
    offset, thin = numbers(columns), (numbers(45, 4), numbers(4, columns))
    weight = numbers(columns, inner).T if turned else numbers(inner, columns)
    exact = x.double() @ weight.double() + out.double() + offset.double() + thin[0].double() @ thin[1].double()
    matmul.product(x, weight, out, offset, thin, add=True)
    assert error(out, exact) <= 1
    upstream = numbers(inner - 1, 50)
    assert error(matmul.gradient(upstream, x.T[1:].contiguous()), upstream.double().T @ x.T[1:].double()) <= 1


@built
@pytest.mark.parametrize(("out", "inner"), [(2, 64), (70, 128), (192, 576), (6, 4160)])
@pytest.mark.parametrize("double", [True, False])
def test_a_weight_in_4_bits_is_multiplied_with_as_it_is_unpacked(
    out: int, inner: int, double: bool, monkeypatch
) -> None:
    pytest.importorskip("bitsandbytes")
    layer = QuantizedLinear(numbers(out, inner), None, torch.device("cpu"), double)
    called: list[str] = []
    original = Kernels.product
    monkeypatch.setattr(Kernels, "product", lambda *args: called.append(type(args[2]).__name__) or original(*args))
    x, upstream, linear = numbers(9, inner), numbers(9, out, seed=1), Plain(layer)
    thin = numbers(9, 2), numbers(2, out)
    linear.forward(x, y := torch.empty(9, out).bfloat16(), thin)
    linear.backward_input(upstream, (), into := torch.empty(9, inner).bfloat16())
    assert called == ["FourBits"] * 2
    weight = layer.dequantized()
    matmul.product(x, weight.T, same := torch.empty_like(y), None, thin)
    assert torch.equal(y, same)
    matmul.product(upstream, weight, same := torch.empty_like(into))
    assert torch.equal(into, same)


@built
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 130), m=st.integers(1, 120), n=st.integers(1, 120))
def test_a_weights_gradient_is_the_formula(rows: int, m: int, n: int) -> None:
    upstream, x = numbers(rows, m), numbers(rows, n, seed=1)
    assert error(matmul.gradient(upstream, x), upstream.double().T @ x.double()) <= 1


@built
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 130), n=st.integers(1, 120))
def test_sums_by_column_are_the_formula_in_fp32(rows: int, n: int) -> None:
    upstream, x = numbers(rows, n), numbers(rows, n, seed=1)
    found = matmul.by_column(upstream, x)
    assert found.dtype == torch.float32
    assert error(found, (upstream.double() * x.double()).sum(0)) <= 1e-5 / ROUNDING


@built
@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 130), n=st.integers(1, 100).map(lambda half: 2 * half), rank=st.integers(1, 40))
def test_thin_products_are_the_formulas(rows: int, n: int, rank: int) -> None:
    x, w, low, y = numbers(rows, n), numbers(rank, n), numbers(rows, rank), numbers(rows, n, seed=1)
    assert error(matmul.narrow(x, w), x.double() @ w.double().T) <= 1
    outer = matmul.outer(low, x)
    assert outer.dtype == torch.float32
    assert error(outer, low.double().T @ x.double()) <= 1e-5 / ROUNDING
    exact = y.double() + low.double() @ w.double()
    matmul.widen(low, w, y)
    assert error(y, exact) <= 1


@built
@pytest.mark.parametrize(("rows", "width"), [(1, 2), (7, 48), (33, 81), (5, 576)])
@pytest.mark.parametrize("skips", [True, False])
def test_norms_are_the_formula(rows: int, width: int, skips: bool) -> None:
    x, weight, upstream = numbers(rows, width), numbers(width, seed=1), numbers(rows, width, seed=2)
    skip = numbers(rows, width, seed=3) if skips else None
    exact = x.double().requires_grad_(), weight.double().requires_grad_()
    y = exact[0] * (exact[0].square().mean(-1, keepdim=True) + 1e-5).rsqrt() * exact[1]
    y.backward(upstream.double())
    found, scale = norm_forward(x, weight, 1e-5, Scratch())
    assert error(found, y.detach()) <= 2  # it rounds twice, as transformers does
    given_ = upstream, x, scale, weight, Scratch()
    assert error(norm_backward(*given_, skip=skip), exact[0].grad + (0 if skip is None else skip.double())) <= 1
    assert error(norm_weight_backward(*given_), exact[1].grad) <= 2


@built
@pytest.mark.parametrize("back", [True, False])
@pytest.mark.parametrize("width", [2, 16, 40, 64, 80])
def test_rotary_positions_turn_to_the_bits_of_pytorchs(width: int, back: bool, by_pytorch) -> None:
    x, halves = numbers(9, 3, width), numbers(2, 9, 1, width // 2)
    cos, sin = torch.cat([halves, halves], dim=-1).contiguous()
    expected = rotate(x.clone(), cos, sin, Scratch(), back)
    by_pytorch.undo()
    assert torch.equal(rotate(x.clone(), cos, sin, Scratch(), back), expected)


@built
@pytest.mark.parametrize("name", sorted(_WRITTEN_OUT))
@pytest.mark.parametrize("gated", [True, False])
def test_activations_are_the_formulas(name: str, gated: bool) -> None:
    activation = _WRITTEN_OUT[name]
    # All sizes: where it is linear, where it is nothing, and between.
    g = torch.cat([numbers(3, 50).flatten() * 3, torch.linspace(-90, 90, 61).bfloat16(), torch.zeros(2).bfloat16()])
    u = numbers(*g.shape) if gated else None
    upstream = numbers(*g.shape, seed=1)
    exact = g.double().requires_grad_(), (numbers(*g.shape) if gated else torch.ones(1)).double().requires_grad_()
    function = {"SiLUActivation": torch.nn.functional.silu, "ReLU": torch.relu}.get(
        name, lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    )
    y = function(exact[0]) * exact[1]
    y.backward(upstream.double())
    assert error(activation.gate(g, u, torch.empty_like(g)), y.detach()) <= 2
    into_g, into_u = upstream.clone(), torch.empty_like(g) if gated else None
    activation.gate_backward(into_g, g, u, into_u, again := torch.empty_like(g))
    assert torch.equal(again, activation.gate(g, u, torch.empty_like(g)))
    assert error(into_g, exact[0].grad) <= 1
    if into_u is not None:
        assert error(into_u, exact[1].grad) <= 1
        in_place, over, inner = upstream.clone(), u.clone(), torch.empty_like(g)
        activation.gate_backward(in_place, g, over, over, inner)
        assert torch.equal(over, into_u) and torch.equal(in_place, into_g) and torch.equal(inner, again)


# What is attended: pieces, causal or not, window, whether scores have a bias.
ROWS = {
    "rows": (Packing((50, 70, 1, 33)).pieces, True, None, False),
    "forked": (Packing((40, 90), ((), (10, 35, 1))).pieces, True, None, False),
    "window": (Packing((100, 20)).pieces, True, 17, False),
    "forked window": (Packing((90,), ((30, 35),)).pieces, True, 40, False),
    "encoder": (Packing((50, 70, 3)).pieces, False, None, True),
    "decoder": (Packing((50, 70, 3)).pieces, True, None, True),
    "across": (
        tuple(
            Piece(row, own, (seen,))
            for row, (own, seen) in enumerate(
                [(slice(0, 9), slice(0, 40)), (slice(9, 30), slice(40, 53)), (slice(30, 36), slice(0, 40))]
            )
        ),
        *(False, None, False),
    ),
}


def scores_mask(
    pieces, causal: bool, window: int | None, bias: Tensor | None, tokens: int, keys: int, heads: int
) -> Tensor:
    """What is added to all scores (heads, tokens, keys), differentiable by the bias."""
    rows = []
    for piece in pieces:
        places = [place for run in piece.keys for place in range(run.start, run.stop)]
        for i in range(piece.length):
            high = piece.seen - piece.length + i + 1 if causal else piece.seen
            low = max(0, high - window) if window else 0
            row = torch.full((heads, keys), float("-inf"), dtype=torch.float64)
            added = torch.zeros(heads, high - low, dtype=torch.float64) if bias is None else bias[:, i, low:high]
            rows.append(row.index_copy(1, torch.tensor(places[low:high]), added))
    assert len(rows) == tokens
    return torch.stack(rows, dim=1)


@built
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 8), (6, 2, 64), (3, 1, 80), (2, 2, 18)])
def test_attention_is_the_formula(name: str, heads: int, groups: int, width: int) -> None:
    pieces, causal, window, biased = ROWS[name]
    tokens, keys = max(one.own.stop for one in pieces), max(run.stop for one in pieces for run in one.keys)
    sizes = (heads, tokens), (groups, keys), (groups, keys)
    query, key, value = (numbers(1, *size, width, seed=1000 * n) for n, size in enumerate(sizes))
    longest = max(one.seen for one in pieces) + 5
    bias = numbers(heads, longest, longest) if biased else None
    upstream = numbers(1, tokens, heads, width, seed=3000)
    inputs = [one.requires_grad_() for one in (query, key, value, *([] if bias is None else [bias]))]
    exact = [one.detach().double().requires_grad_() for one in inputs]
    wide = [exact[0][0], *(one[0].repeat_interleave(heads // groups, 0) for one in exact[1:3])]
    mask = scores_mask(pieces, causal, window, exact[3] if biased else None, tokens, keys, heads)
    out = ((wide[0] @ wide[1].transpose(1, 2) * 0.3 + mask).softmax(-1) @ wide[2]).transpose(0, 1)[None]
    out.backward(upstream.double())

    attended = Fused(pieces, plan_of(pieces, together=biased), 0.3, causal, window, bias)
    found = attend(query, key, value, attended, bias)
    found.backward(upstream)
    assert error(found.detach(), out.detach()) <= 2
    for mine, theirs in zip(inputs, exact, strict=True):  # P and dS are rounded before the products with them
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0.03, atol=0.1 * float(theirs.grad.std()))
        assert (mine.grad - theirs.grad).norm() < 1.5 * ROUNDING * theirs.grad.norm()


@pytest.fixture
def on_threads() -> Iterator:
    """Runs something on so many threads."""
    before = torch.get_num_threads()

    def run(threads: int, work) -> list[Tensor]:
        torch.set_num_threads(threads)
        return work()

    yield run
    torch.set_num_threads(before)


@built
@pytest.mark.parametrize("rows", [131, 1100])
def test_no_bit_depends_on_the_number_of_threads(on_threads, rows: int) -> None:
    x, w, thin, low, upstream = (
        numbers(rows, 90),
        numbers(90, 100),
        numbers(8, 100),
        numbers(rows, 8),
        numbers(rows, 600),
    )
    kernels = kernels_for(x)
    pieces = Packing((40, 91), ((), (10, 35, 1))).pieces
    heads = [numbers(1, size, 131, 16) for size in (6, 2, 2)]

    def work() -> list[Tensor]:
        matmul.product(x, w, out := torch.empty(rows, 100).bfloat16(), None, (low, thin))
        inputs = [one.clone().requires_grad_() for one in heads]
        found = attend(*inputs, Fused(pieces, plan_of(pieces), 0.3, True))
        gradients = torch.autograd.grad(found, inputs, numbers(1, 131, 6, 16, seed=9))
        more = matmul.gradient(upstream, x), kernels.narrow(x, numbers(8, 90)), kernels.outer(low, x)
        return [
            out,
            found.detach(),
            *gradients,
            *more,
            kernels.norm_weight(x, x, torch.ones(rows, 1)),
            kernels.norm_of(upstream),
        ]

    one, *others = (on_threads(threads, work) for threads in (1, 2, 3, 4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@built
@pytest.mark.parametrize("size", [2, 16, 301])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_formula(size: int, smoothing: float) -> None:
    logits, labels = numbers(7, size) * 4, torch.tensor([0, 1, size - 1, size // 2, 0, 1, size - 1])
    logits[3] += 200  # as far from 0 as logits may be
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, labels, reduction="sum", label_smoothing=smoothing)
    expected.backward()
    found, gradient = loss._cross_entropy(place := logits.clone(), labels, smoothing, True)
    assert gradient is place, "in the place of the logits"
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert error(gradient, exact.grad) <= 1
    alone, none = loss._cross_entropy(logits, labels, smoothing, False)
    assert torch.equal(alone, found) and none is None


@built
def test_what_is_far_below_the_best_has_no_part_and_no_denormal_number_is_made() -> None:
    logits = torch.tensor([[0.0, -80, -86, -88, -95, -103, -200, -torch.inf]], dtype=torch.bfloat16)
    exact = logits.double().softmax(-1)
    found, gradient = loss._cross_entropy(logits.clone(), torch.tensor([1]), 0.0, True)
    torch.testing.assert_close(found.double(), -exact[0, 1].log(), rtol=1e-5, atol=0)
    exact[0, 1] -= 1
    torch.testing.assert_close(gradient.double()[0, :3], exact[0, :3], rtol=2**-8, atol=0)
    assert not gradient[0, 3:].any()


@built
def test_logits_that_autograd_kept_are_not_lost_unseen() -> None:
    """The gradient takes their place: a head that needs its own output for the way back is an error."""
    states, labels = numbers(3, 16).requires_grad_(), torch.tensor([0, 5, 15])
    linear, kept = states * 2.0, (states * 2.0).tanh()
    _, into = loss._cross_entropy(linear.detach(), labels, 0.0, True)
    torch.autograd.grad(linear, states, into)
    _, into = loss._cross_entropy(kept.detach(), labels, 0.0, True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(kept, states, into)


@built
def test_scores_of_labels_are_the_formula_without_a_copy_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = numbers(300, 301) * 4, torch.arange(300)
    logits[torch.arange(0, 300, 3), labels[::3]] = 40
    base = SimpleNamespace(logits=lambda chunk: chunk, grafts=SimpleNamespace(route=SimpleNamespace(parts=["one"])))
    monkeypatch.setattr(loss, "target_states", lambda base, batch: batch.states)
    monkeypatch.delattr(loss.F, "cross_entropy")  # PyTorch's, which copies
    scores, hits = loss.label_scores(base, SimpleNamespace(states=logits, labels=labels))  # type: ignore[arg-type]
    expected = logits.double().log_softmax(-1)[torch.arange(300), labels]
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(hits, logits.double().argmax(-1) == labels) and 100 <= int(hits.sum()) < 110


@built
@pytest.mark.parametrize("size", [1, 17, 40_000])
def test_a_norm_is_the_formula(size: int) -> None:
    x = numbers(size)
    found = kernels_for(x).norm_of(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x.double().norm(), rtol=1e-6, atol=0)


@built
@pytest.mark.parametrize("size", [1, 17, 40_000])
def test_adamws_step_is_the_formula(size: int) -> None:
    """Read in float64, its numbers; the weight is the master to the bit of rounding."""
    master, m, v = (numbers(size, seed=seed).float() * 1.001 for seed in (1, 2, 3))
    v.square_().add_(0.01)  # what nearly vanishes multiplies the errors of the first moment
    gradient, weight = numbers(size, seed=4), numbers(size, seed=5)
    how = AdamW(scale=0.3, rate=0.02, decay=0.1, beta1=0.9, beta2=0.999, root=1.7, eps=1e-8)
    g = gradient.double() * how.scale
    first = how.beta1 * m.double() + (1 - how.beta1) * g
    second = how.beta2 * v.double() + (1 - how.beta2) * g * g
    expected = (1 - how.decay) * master.double() - how.rate * first / (how.root * second.sqrt() + how.eps)
    kernels_for(gradient).adamw(weight, master, (m, v), gradient, how)
    for found, exact in ((m, first), (v, second), (master, expected)):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(weight, master.bfloat16())


@built
def test_no_rows_are_no_numbers() -> None:
    out = torch.empty(0, 5).bfloat16()
    matmul.product(numbers(0, 6), numbers(6, 5), out)
    assert torch.equal(matmul.gradient(numbers(0, 7), numbers(0, 5)), torch.zeros(7, 5).bfloat16())
    assert matmul.narrow(numbers(0, 6), numbers(3, 6)).shape == (0, 3)
    assert torch.equal(matmul.outer(numbers(0, 3), numbers(0, 6)), torch.zeros(3, 6))
    assert norm_forward(numbers(0, 6), numbers(6), 1e-5, Scratch())[0].shape == (0, 6)
    wide, bias = torch.full((3, 150), 7.0).bfloat16(), numbers(150)
    matmul.product(numbers(3, 0), numbers(0, 150), wide, bias)
    assert torch.equal(wide, bias.expand(3, 150))
    assert torch.equal(matmul.gradient(numbers(0, 7), numbers(0, 150)), torch.zeros(7, 150).bfloat16())
    assert torch.equal(matmul.by_column(numbers(0, 5), numbers(0, 5)), torch.zeros(5))


@built
def test_shapes_that_do_not_fit_are_pytorchs_errors() -> None:
    x, out = numbers(4, 6), torch.empty(4, 5).bfloat16()
    for attempt in (
        lambda: matmul.product(x, numbers(8, 5), out),
        lambda: matmul.product(x, numbers(6, 5), out, numbers(3)),
        lambda: matmul.product(x, numbers(6, 5), out, None, (numbers(4, 2), numbers(2, 7))),
        lambda: matmul.gradient(x, numbers(3, 6)),
        lambda: matmul.narrow(x, numbers(2, 8)),
        lambda: matmul.outer(numbers(5, 2), x),
    ):
        with pytest.raises(RuntimeError):
            attempt()


@built
def test_what_is_no_number_stays_none() -> None:
    x = torch.tensor([[1.0, float("nan")], [2.0, 3.0]]).bfloat16()
    for activation in _WRITTEN_OUT.values():
        assert activation.gate(x, None, torch.empty_like(x)).isnan().tolist() == [[False, True], [False, False]]
    query, key, value = (numbers(1, 1, 3, 8, seed=seed) for seed in range(3))
    key[0, 0, 1, 0] = float("nan")
    out = attend(query, key, value, Fused(pieces := Packing((3,)).pieces, plan_of(pieces), 0.3, True))
    assert out.isnan().any(dim=-1).flatten().tolist() == [False, True, True]


@built
def test_a_gradient_of_any_layout_is_taken() -> None:
    inputs = [numbers(1, 2, 5, 8, seed=seed).requires_grad_() for seed in range(3)]
    found = attend(*inputs, Fused(pieces := Packing((5,)).pieces, plan_of(pieces), 0.3, True))
    upstream = numbers(1, 5, 8, 2).transpose(2, 3)
    apart, alike = (
        torch.autograd.grad(found, inputs, one, retain_graph=True) for one in (upstream, upstream.contiguous())
    )
    assert all(torch.equal(*both) for both in zip(apart, alike, strict=True))
    linear = torch.nn.Linear(8, 6).bfloat16()
    quicken_linears(linear)
    x = numbers(3, 8).requires_grad_()
    linear(x).clamp_(-0.1, 0.1).sum().backward()  # as some models do with what a linear gave
    exact = x.detach().double().requires_grad_()
    torch.nn.functional.linear(exact, linear.weight.double(), linear.bias.double()).clamp(-0.1, 0.1).sum().backward()
    assert error(x.grad, exact.grad) <= 0.05 / ROUNDING


def test_only_what_they_are_for_is_said_to_lack_them(by_pytorch) -> None:
    assert why_none(numbers(2)) == "switched off" and kernels_for(numbers(2)) is None
    assert why_none(torch.zeros(2)) is None and kernels_for(torch.zeros(2)) is None


def test_other_tensors_run_by_pytorch(by_pytorch) -> None:
    """Without kernels the same functions give the same numbers."""
    x, w, low, thin, offset = numbers(9, 6), numbers(6, 5), numbers(9, 2), numbers(2, 5), numbers(5)
    matmul.product(x, w, out := torch.empty(9, 5).bfloat16(), offset, (low, thin))
    exact = x.double() @ w.double() + low.double() @ thin.double() + offset.double()
    assert error(out, exact) <= 3
    matmul.product(x, w, out, offset, None, add=True)
    assert error(out, exact + x.double() @ w.double() + offset.double()) <= 4
    assert error(matmul.narrow(x, numbers(2, 6)), x.double() @ numbers(2, 6).double().T) <= 1
    assert error(matmul.outer(low, x), low.double().T @ x.double()) <= 1
    assert error(matmul.gradient(low, x), low.double().T @ x.double()) <= 1
