"""A block as one function, a decoder's and T5's, against transformers' modules and autograd."""

import copy
from collections import Counter

import pytest
import torch
from pydantic import TypeAdapter
from tests import tiny
from tests.models.test_parity import rows_for, start

from luthier.encoding.batches import collate
from luthier.models import attention, where, written_out
from luthier.models import loss as losses
from luthier.models.base import BaseModel
from luthier.models.families import llama, t5
from luthier.models.kernels import library
from luthier.models.ledger import Ledger
from luthier.models.loss import loss_sum
from luthier.models.products import Plain
from luthier.models.recompute import recomputed
from luthier.models.scratch import ROOM
from luthier.models.sublayers import Attention
from luthier.tuning import METHODS, attach
from luthier.tuning.method import parameters

METHODS_HERE = {
    "lora": {"method": "lora", "rank": 4, "alpha": 8},
    "lora of some linears": {"method": "lora", "rank": 4, "targets": ["v_proj", "up_proj"]},
    "norms": {"method": "selective", "targets": "layernorm"},
    "biases": {"method": "selective", "targets": "bias"},
    "some weights": {"method": "selective", "targets": ["*k_proj.weight", "*down_proj.weight"]},
    "full": {"method": "full"},
    "prompt": {"method": "prompt_tuning", "length": 3},
    "ia3": {"method": "ia3"},
    "behind attention and MLP": {"method": "bottleneck", "placement": "houlsby", "reduction": 4, "activation": "silu"},
    "behind the MLP": {"method": "bottleneck", "activation": "gelu", "reduction": 4},
}
# T5's linears are named otherwise.
NAMES_IN_T5 = {"v_proj": "v", "up_proj": "wo", "*k_proj.weight": "*.k.weight", "*down_proj.weight": "*.wo.weight"}
FAMILIES = ("llama", "mistral", "qwen2", "t5", "t5-gated")
CASES = [(family, name) for family in FAMILIES for name in METHODS_HERE if name != "biases" or family == "qwen2"]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each block ran as one function; here it does on any device, in any precision."""
    found: list[bool] = []
    for family in (llama, t5):
        original = family._sublayers

        def counted(*args, original=original):
            made = original(*args)
            found.append(made is not None)
            return made

        monkeypatch.setattr(family, "_sublayers", counted)
    monkeypatch.setattr(attention, "_is_explicit", lambda *_: True)
    token = where.stands_for.set("cpu")
    monkeypatch.setattr(BaseModel, "on_cpu", True)
    yield found
    where.stands_for.reset(token)


def blocks(base: BaseModel) -> int:
    """Of both stacks, where there are two."""
    return base.blocks * (2 if base.encoder_decoder else 1)


def prepared(family: str, settings: dict, dtype: torch.dtype = torch.float32, quantize=None) -> BaseModel:
    base = tiny.make(family, dtype, quantize=quantize)
    if base.encoder_decoder and "targets" in settings and isinstance(settings["targets"], list):
        settings = settings | {"targets": [NAMES_IN_T5[one] for one in settings["targets"]]}
    attach(base, "t", TypeAdapter(METHODS[settings["method"]]).validate_python(settings), 0)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters(base, "t").values():
            parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter) * 0.05)
    base.use("t")
    return base


def run(base: BaseModel, fork: bool = True) -> dict[str, torch.Tensor]:
    owned = parameters(base, "t")
    batch = collate(rows_for(base), start(base), fork and not base.encoder_decoder).to(base.device)
    loss = loss_sum(base, batch)
    gradients = torch.autograd.grad(loss, list(owned.values()))
    return {"loss": loss.detach(), **dict(zip(owned, gradients, strict=True))}


def through_modules(base: BaseModel, monkeypatch: pytest.MonkeyPatch, fork: bool = True) -> dict[str, torch.Tensor]:
    with monkeypatch.context() as patch:
        for family in (llama, t5):
            patch.setattr(family, "_sublayers", lambda *args: None)
        return run(base, fork)


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, one in expected.items():
        assert (found[name].float() - one.float()).norm() <= tolerance * one.float().norm() + 1e-7, name


@pytest.mark.parametrize(("family", "name"), CASES)
def test_loss_and_gradients_are_those_of_the_modules(family: str, name: str, passes, monkeypatch) -> None:
    base = prepared(family, METHODS_HERE[name])
    found = run(base)
    assert passes == [True] * blocks(base)
    expected = through_modules(base, monkeypatch)
    assert all(one.norm() > 0 for one in expected.values())
    close(found, expected, 1e-5)


@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
@pytest.mark.parametrize("name", ["lora", "full", "prompt"])
def test_t5_gives_what_padded_rows_give_through_transformers(family: str, name: str, passes, monkeypatch) -> None:
    base = prepared(family, METHODS_HERE[name])
    found = run(base)
    assert passes == [True] * blocks(base)
    monkeypatch.setattr(BaseModel, "packs_pairs", lambda *_: False)
    base.model.set_attn_implementation("eager")
    expected = run(base)
    assert any("relative_attention_bias" in one for one in expected) == (name == "full")
    close(found, expected, 1e-5)


def test_on_a_base_in_4_bits(passes, monkeypatch) -> None:
    pytest.importorskip("bitsandbytes")
    base = prepared("llama", METHODS_HERE["lora"], quantize="nf4")
    found = run(base)
    assert passes == [True] * blocks(base)
    close(found, through_modules(base, monkeypatch), 1e-5)


def test_in_bfloat16_it_is_as_near_to_float32_as_the_modules_are(passes, monkeypatch) -> None:
    base, exact = (prepared("llama", METHODS_HERE["lora"], dtype) for dtype in (torch.bfloat16, torch.float32))
    # The same numbers in both: what bfloat16 holds.
    exact.model.load_state_dict({name: one.float() for name, one in base.model.state_dict().items()})
    truth = through_modules(exact, monkeypatch)

    def error(found: dict[str, torch.Tensor]) -> float:
        return sum(
            float((found[name].float() - one).square().sum() / one.square().sum()) for name, one in truth.items()
        )

    own, theirs = error(run(base)), error(through_modules(base, monkeypatch))
    assert passes == [True] * blocks(base)
    assert 0 < own < 1.5 * theirs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["lora", "prompt"])
def test_forward_it_rounds_where_the_modules_round(family: str, name: str, passes, monkeypatch) -> None:
    base = prepared(family, METHODS_HERE[name], torch.bfloat16)
    assert torch.equal(run(base)["loss"], through_modules(base, monkeypatch)["loss"]) and any(passes)


def test_weights_of_long_rows_are_computed_again_to_the_same_bits(passes, monkeypatch) -> None:
    base = prepared("llama", METHODS_HERE["lora"])
    kept = run(base)
    monkeypatch.setattr(written_out, "KEPT_TO", 0)
    again = run(base)
    assert all(torch.equal(again[name], one) for name, one in kept.items())


def test_a_pass_leaves_the_numbers_of_another_alone(passes) -> None:
    """Two losses before either goes back: what blocks share is not what they keep."""
    base = prepared("llama", METHODS_HERE["lora"])
    owned = list(parameters(base, "t").values())
    alone = run(base)
    rows = rows_for(base), rows_for(base, count=3, seed=1)
    first, second = (loss_sum(base, collate(some, None, True)) for some in rows)
    torch.autograd.grad(second, owned)
    found = torch.autograd.grad(first, owned)
    for name, one in zip(parameters(base, "t"), found, strict=True):
        assert (one - alone[name]).norm() <= 1e-6 * alone[name].norm(), name


@pytest.mark.parametrize(("family", "name"), CASES)
def test_checkpointed_it_gives_the_same_bits(family: str, name: str, passes, monkeypatch) -> None:
    """Computed again on the way back, where what one block keeps takes the place of the last one's."""
    base = prepared(family, METHODS_HERE[name])
    plain = run(base)
    forward, backward, computed, places = Attention.forward, Attention.backward, [], set()
    monkeypatch.setattr(Attention, "forward", lambda self, x: computed.append(self) or forward(self, x))
    monkeypatch.setattr(
        Attention, "backward",
        lambda self, upstream, kept, wanted: places.add((self.encoded is None, len(upstream), kept[2].data_ptr(), self.shares)) or backward(self, upstream, kept, wanted),
    )  # fmt: skip
    with recomputed(base.model):
        again = run(base)
    attentions = sum(
        "Attention" in type(one).__name__ and not hasattr(one, "SelfAttention") and not hasattr(one, "EncDecAttention")
        for one in base.model.modules()
    )
    assert len(computed) == 2 * attentions and all(passes), "once forward, and again on the way back"
    assert all(shares for *_, shares in places)
    assert len(places) == len({one[:2] for one in places}), "one place for each of a block's sublayers"
    assert plain.keys() == again.keys() and all(torch.equal(again[key], one) for key, one in plain.items())


@pytest.mark.parametrize(("family", "name"), CASES)
def test_checkpointed_by_kernels_it_gives_the_same_bits(family: str, name: str, passes) -> None:
    """In bfloat16, where a gradient takes the place of what it is made of."""
    base = prepared(family, METHODS_HERE[name], torch.bfloat16)
    plain = run(base)
    for share in (1.0, 0.5):
        with recomputed(base.model, share):
            again = run(base)
        assert plain.keys() == again.keys() and all(torch.equal(again[key], one) for key, one in plain.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_lets_go_of_the_room_that_training_left(family: str, passes) -> None:
    base = prepared(family, METHODS_HERE["lora"])
    run(base)
    assert base.scratch._flat
    before = loss_sum(base, batch := collate(rows_for(base), start(base), False))
    with torch.no_grad():
        loss_sum(base, batch)
    assert not base.scratch._flat
    owned = parameters(base, "t")
    later = torch.autograd.grad(before, list(owned.values()))
    for one, other in zip(later, torch.autograd.grad(loss_sum(base, batch), list(owned.values())), strict=True):
        assert torch.equal(one, other), "a pass that waited for its way back is whole"


@pytest.mark.parametrize(("name", "times"), [("norms", 1), ("ia3", 1), ("lora", 1), ("full", 1), ("behind the MLP", 2)])
def test_the_last_product_is_computed_again_only_where_its_output_is_kept(
    name: str, times: int, passes, monkeypatch
) -> None:
    base = prepared("llama", METHODS_HERE[name])
    counts: Counter[str] = Counter()
    names = {module: path.split(".")[-1] for path, module in base.grafts.modules.items()}
    forward = Plain.forward
    monkeypatch.setattr(
        Plain, "forward", lambda self, *rest: counts.update([names[self.module]]) or forward(self, *rest)
    )
    with recomputed(base.model):
        run(base)
    assert counts["gate_proj"] == counts["o_proj"] == 2 * base.blocks
    assert counts["down_proj"] == times * base.blocks


class Sizes(Ledger):
    """The bytes of every storage made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def _note(self, tensor: torch.Tensor) -> int:
        self.sizes.append(size := super()._note(tensor))
        return size


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ["lora", "norms", "prompt", "ia3"])
def test_checkpointed_a_second_pass_makes_nothing_as_large_as_the_inside_of_an_mlp(
    family: str, name: str, passes, monkeypatch
) -> None:
    """The head's logits neither, some at a time: they stand where blocks have what they need for a moment."""
    if isinstance(found := library.library(), str):
        pytest.skip(f"no kernels: {found}")  # without them sums by column make their terms first
    base = prepared(family, METHODS_HERE[name], torch.bfloat16)
    places, plain = [], losses._cross_entropy
    monkeypatch.setattr(losses, "_cross_entropy", lambda one, *rest: places.append(one.data_ptr()) or plain(one, *rest))
    monkeypatch.setattr(losses, "BY_KERNELS", 4)
    with recomputed(base.model):
        first = run(base, fork=False)
        places.clear()
        ledger = Sizes()
        ledger.hold([*base.model.parameters(), *base.model.buffers(), *base.scratch._flat.values()], "there before")
        ledger.hold(parameters(base, "t").values(), "there before")
        with ledger:
            second = run(base, fork=False)
    assert all(torch.equal(first[key], one) for key, one in second.items())
    like = torch.empty(0, dtype=base.dtype, device=base.device)
    assert len(places) > 2 and set(places) == {base.scratch.take(ROOM, (1,), like).data_ptr()}
    tokens = sum(len(row.prompt + row.target) - 1 for row in rows_for(base))  # nothing is asked of the last
    assert 0 < max(ledger.sizes) < tokens * base.config.intermediate_size * base.dtype.itemsize


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_checkpointed_losses_may_go_back_in_any_order(share: float, passes) -> None:
    base = prepared("llama", METHODS_HERE["lora"])
    owned = list(parameters(base, "t").values())
    rows = rows_for(base), rows_for(base, count=3, seed=1)
    loss = lambda some: loss_sum(base, collate(some, None, True))  # noqa: E731
    plain = [torch.autograd.grad(loss(some), owned) for some in rows]
    with recomputed(base.model, share):
        first, second = map(loss, rows)
        both = torch.autograd.grad(second, owned), torch.autograd.grad(first, owned)
        together = torch.autograd.grad(loss(rows[0]) + loss(rows[1]), owned)
    for found, expected in zip(both[::-1], plain, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    for one, *others in zip(together, *plain, strict=True):
        torch.testing.assert_close(one, sum(others), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "bottleneck", "placement": "parallel"},
        {"method": "lora", "dora": True},
        {"method": "lora", "dropout": 0.1},
        {"method": "prefix_tuning", "length": 3},
    ],
    ids=lambda one: "-".join(map(str, one.values())),
)
def test_what_it_has_no_gradient_of_runs_through_the_modules(settings: dict, passes) -> None:
    base = prepared("llama", settings)
    run(base, fork=False)
    assert passes and not any(passes)


def test_a_copied_model_runs_its_own_modules(passes, monkeypatch) -> None:
    base = prepared("llama", METHODS_HERE["norms"])
    other = BaseModel(copy.deepcopy(base.model), base.tokenizer)
    attach(other, "t", TypeAdapter(METHODS["selective"]).validate_python(METHODS_HERE["norms"]), 0)
    other.use("t")
    with torch.no_grad():
        for one in base.model.parameters():
            one.zero_()  # what the copy runs is its own
    own, through = run(other), through_modules(other, monkeypatch)
    assert own["loss"] != 0 and all(one.isfinite().all() and one.norm() > 0 for one in own.values())
    for name, one in through.items():
        assert (own[name] - one).norm() <= 1e-5 * one.norm(), name


@pytest.mark.parametrize(
    "place", ["mlp", "mlp.act_fn", "self_attn", "input_layernorm", "mlp.up_proj", "self_attn.v_proj"]
)
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_in_a_block_are_called(place: str, kind: str, passes) -> None:
    base = prepared("llama", {"method": "lora", "targets": ["v_proj"]})  # whose module is a graft
    check_hooks(base, base.model.model.layers[0], place, kind, passes)


PLACES_IN_T5 = [
    *("layer.0", "layer.0.layer_norm", "layer.1.EncDecAttention", "layer.1.EncDecAttention.v"),
    *("layer.2.DenseReluDense", "layer.2.DenseReluDense.act", "layer.2.DenseReluDense.wi_1"),
]


@pytest.mark.parametrize("place", PLACES_IN_T5)
def test_hooks_in_t5s_block_are_called(place: str, passes) -> None:
    base = prepared("t5-gated", {"method": "lora", "targets": ["v_proj"]})
    check_hooks(base, base.model.decoder.block[0], place, "register_forward_hook", passes)


def check_hooks(base: BaseModel, hooked: torch.nn.Module, place: str, kind: str, passes: list[bool]) -> None:
    called: list[str] = []
    hook = getattr(hooked.get_submodule(place), kind)(lambda *_: called.append(place))
    run(base)
    hook.remove()
    assert called == [place] and sorted(passes) == [False] + [True] * (blocks(base) - 1)
