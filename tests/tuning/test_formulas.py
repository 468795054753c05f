"""Every delta against its equation, written out; and what patterns and starts choose."""

import pytest
import torch
from tests import tiny
from torch import nn

from luthier.errors import UserError
from luthier.tuning import IA3, Bottleneck, Full, LoRA, Method, PromptTuning, attach, parameters
from luthier.tuning.bottleneck import Adapter
from luthier.tuning.dora import DoRA, DoRAEmbedding
from luthier.tuning.ia3 import ScaledInput, ScaledOutput
from luthier.tuning.lora_embedding import LowRankEmbedding
from luthier.tuning.low_rank import LowRank


def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def moved(delta: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return delta


def test_the_worked_example_of_lora() -> None:
    """512 x 64 = 32,768 weights; r = 8 gives A 512 + B 4,096 = 4,608: 86 % fewer."""
    delta = LowRank((64, 512), rank=8, scale=2.0, dropout=0.0, generator=torch.Generator())
    assert delta.lora_A.weight.numel() == 512
    assert delta.lora_B.weight.numel() == 4096
    assert round(1 - 4608 / (512 * 64), 2) == 0.86


def test_lora() -> None:
    delta = moved(LowRank((6, 5), rank=2, scale=1.5, dropout=0.0, generator=drawn()))
    x, w = torch.randn(4, 6), torch.randn(5, 6)
    expected = x @ (w + 1.5 * delta.lora_B.weight @ delta.lora_A.weight).T
    torch.testing.assert_close(delta(x, x @ w.T), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_dora(bias: bool) -> None:
    linear = nn.Linear(6, 5, bias=bias)
    delta = moved(DoRA(linear, 2, 1.5, 0.0, drawn()))
    x = torch.randn(4, 6)
    whole = linear.weight + 1.5 * delta.lora_B.weight @ delta.lora_A.weight
    expected = x @ (delta.lora_magnitude_vector / whole.norm(dim=1))[:, None].mul(whole).T + (
        linear.bias if bias else 0
    )
    torch.testing.assert_close(delta(x, linear(x)), expected)


def test_the_norm_of_dora_is_a_constant_to_the_gradient() -> None:
    linear = nn.Linear(6, 5, bias=False)
    delta = moved(DoRA(linear, 2, 1.5, 0.0, drawn()))
    x = torch.randn(4, 6)
    delta(x, linear(x)).sum().backward()
    fixed = delta._norms()
    a, b = (one.weight.detach().requires_grad_() for one in (delta.lora_A, delta.lora_B))
    whole = linear.weight.detach() + 1.5 * b @ a
    (x @ (delta.lora_magnitude_vector.detach() / fixed)[:, None].mul(whole).T).sum().backward()
    torch.testing.assert_close(delta.lora_A.weight.grad, a.grad)
    torch.testing.assert_close(delta.lora_B.weight.grad, b.grad)


def test_dora_reads_a_quantized_weight_through_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored weight may be packed codes; the numbers it stands for are read once for each change of A and B."""
    from luthier.tuning import dora

    linear, numbers, asked = nn.Linear(6, 5, bias=False), torch.randn(5, 6), []
    linear.weight = nn.Parameter(torch.zeros(15, 1, dtype=torch.uint8), requires_grad=False)
    monkeypatch.setattr(dora, "dense_weight", lambda module: asked.append(module) or numbers)
    delta = moved(DoRA(linear, 2, 1.0, 0.0, drawn()))
    x = torch.randn(3, 6)
    whole = numbers + delta.lora_B.weight @ delta.lora_A.weight
    expected = x @ (delta.lora_magnitude_vector / whole.norm(dim=1))[:, None].mul(whole).T
    for _ in range(3):
        torch.testing.assert_close(delta(x, x @ numbers.T), expected)
    assert len(asked) == 2, "at the start, and after A and B moved"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("kind", [LowRankEmbedding, DoRAEmbedding])
def test_lora_on_an_embedding(kind: type, family: str) -> None:
    table = tiny.make(family).embedding
    delta = moved(kind(table, 3, 0.5, 0.0, drawn()))
    ids = torch.tensor([[3, 9, 9], [4, 0, 1]])
    whole = table.weight + 0.5 * (delta.lora_embedding_B @ delta.lora_embedding_A).T  # (vocabulary, D)
    if kind is DoRAEmbedding:
        whole = whole * (delta.lora_magnitude_vector / whole.norm(dim=0))
    factor = table.embed_scale if family == "gemma2" else 1.0
    torch.testing.assert_close(delta(ids, table(ids)), whole[ids] * factor, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(delta.merged(table.weight, None)[0], whole)


@pytest.mark.parametrize(("parallel", "activation"), [(False, "relu"), (True, "gelu"), (False, "silu"), (True, "tanh")])
def test_bottleneck(parallel: bool, activation: str) -> None:
    delta = moved(Adapter(6, 2, activation, parallel, drawn()))
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    h = x if parallel else y
    f = {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU(), "tanh": nn.Tanh()}[activation]
    down, up = delta.adapter_down, delta.adapter_up
    inner = f(h @ down.weight.T + down.bias)
    torch.testing.assert_close(delta(x, y), y + inner @ up.weight.T + up.bias)


def test_ia3() -> None:
    linear, x = nn.Linear(6, 5), torch.randn(4, 6)
    outer, inner = moved(ScaledOutput(5)), moved(ScaledInput(6))
    torch.testing.assert_close(outer(x, linear(x)), linear(x) * outer.ia3_l)
    torch.testing.assert_close(inner(x, linear(inner.enter(x))), linear(x * inner.ia3_l))


def test_patterns_give_modules_their_own_rank_and_scale() -> None:
    base = tiny.make("llama")
    attach(
        base,
        "t",
        LoRA(
            rank=4, alpha=8, rslora=True, rank_pattern={"v_proj": 1, r"1\.mlp\.\w+": 9}, alpha_pattern={"q_proj": 12.0}
        ),
    )
    shapes = {key: one.shape[0] for key, one in parameters(base, "t").items() if "lora_A" in key}
    assert shapes["model.layers.0.self_attn.v_proj.lora_A.weight"] == 1
    assert shapes["model.layers.0.mlp.up_proj.lora_A.weight"] == 4
    assert shapes["model.layers.1.mlp.up_proj.lora_A.weight"] == 9
    scale = lambda path: base.model.get_submodule(path).delta("t").scale  # noqa: E731
    assert scale("model.layers.0.self_attn.q_proj") == pytest.approx(12 / 4**0.5)
    assert scale("model.layers.1.mlp.up_proj") == pytest.approx(8 / 9**0.5)
    with pytest.raises(UserError, match="alpha pattern 'k_prj' matches none of the 14 targets"):
        attach(base, "u", LoRA(alpha_pattern={"k_prj": 2.0}))
    with pytest.raises(ValueError, match="v_proj is 0; it must be at least 1"):
        LoRA(rank_pattern={"v_proj": 0})


def test_blocks_choose_targets() -> None:
    def blocks(layers: list[int]) -> set[str]:
        base = tiny.make("llama", blocks=3)
        attach(base, "t", LoRA(targets="attention", layers=layers))
        return {key.split(".")[2] for key in parameters(base, "t")}

    assert blocks([-1]) == {"2"}
    assert blocks([0, 2]) == {"0", "2"}
    with pytest.raises(UserError, match="this llama model has no block 3, but blocks 0 to 2, or -3"):
        blocks([3])


def test_class_labels_start_a_prompt() -> None:
    base = tiny.make("gemma2")
    attach(base, "t", PromptTuning(length=3, init="class_labels", labels=["yes", "red blue"]))
    mean = lambda text: base.embedding(torch.tensor(base.tokenizer(text).input_ids)).mean(0)  # noqa: E731
    vectors = base.grafts.prompts["t"]
    torch.testing.assert_close(vectors[0], mean("yes"))
    torch.testing.assert_close(vectors[1], mean("red blue"))
    assert vectors.shape == (3, base.width)
    with pytest.raises(UserError, match="class_labels needs `labels`, or a task with answer choices"):
        attach(base, "u", PromptTuning(init="class_labels"))


def test_a_family_whose_parts_are_unknown_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.models import parts

    monkeypatch.setattr(parts, "LAYOUTS", parts.LAYOUTS[1:2])
    with pytest.raises(
        UserError, match=r"stand in a llama model is not known here.*Its linear modules end in: down_proj"
    ):
        attach(tiny.make("llama"), "t", IA3())
    attach(tiny.make("llama"), "t", IA3(targets=["k_proj", "v_proj"], inner="down_proj"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="MLP of this opt model is no module of its own"):
        attach(tiny.make("opt"), "t", Bottleneck(placement="parallel"))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("method", [LoRA(rank=2, dora=True), LoRA(rank=2, targets="embeddings", dora=True), Full()])
def test_a_tuning_starts_from_the_base_whatever_is_in_use(method: Method, merged: bool) -> None:
    base = tiny.make("llama")
    attach(base, "first", method, seed=3)
    attach(base, "other", Full())
    with torch.no_grad():
        for parameter in parameters(base, "other").values():
            parameter.mul_(1.3)
    base.use("other", merged=merged)
    used = base.model.model.norm.weight.clone()
    attach(base, "second", method, seed=3)
    for key, parameter in parameters(base, "first").items():
        assert torch.equal(parameter, parameters(base, "second")[key]), key
    assert torch.equal(base.model.model.norm.weight, used), "what was in use is so again"
