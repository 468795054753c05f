"""The choices of training: each does what its formula says, and off it changes no bit."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests import tiny
from tests.training.test_loop import rows_for, same, weights
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier.encoding.batches import collate
from luthier.encoding.order import Shuffled
from luthier.errors import Interrupted, UserError
from luthier.models.base import BaseModel
from luthier.models.loss import loss_sum
from luthier.models.noise import noisy
from luthier.models.run import target_states
from luthier.training import loop
from luthier.training.log import tracker_hooks
from luthier.training.loop import Validation, accumulate, train
from luthier.training.optimizer import Optimizer
from luthier.training.rates import rate_factors
from luthier.training.settings import TrainingSettings
from luthier.tuning import IA3, Bottleneck, Full, LoRA, Method, PrefixTuning, attach, parameters

FAMILIES = ["llama", "gpt2", "opt", "t5"]
each_family = pytest.mark.parametrize("family", FAMILIES)


def tuned(family: str = "llama", method: object = None, dtype: torch.dtype = torch.float32) -> BaseModel:
    base = tiny.make(family, dtype)
    attach(base, "t", method or LoRA(rank=2, dropout=0.1), seed=1)  # type: ignore[arg-type]
    base.use("t")
    return base


def gradients(base: BaseModel) -> dict[str, torch.Tensor]:
    found = {
        key: parameter.grad.clone() for key, parameter in parameters(base, "t").items() if parameter.grad is not None
    }
    for parameter in parameters(base, "t").values():
        parameter.grad = None
    return found


@pytest.mark.parametrize("share", [True, 0.5])
@each_family
def test_checkpointed_gradients_are_the_same_bits(family: str, share: float) -> None:
    base = tuned(family)
    rows, settings = rows_for(base, 6), TrainingSettings(gradient_checkpointing=share)
    with torch.no_grad():
        for parameter in parameters(base, "t").values():
            parameter.add_(0.05)
    found = []
    for chosen in (TrainingSettings(), settings):
        torch.manual_seed(3)
        loop._gradients(base, "t", rows, chosen, loop.Progress(micro_batch_tokens=60), lambda event: None)
        found.append(gradients(base))
    assert same(found[0], found[1]) and found[0]
    blocks = [module for module in base.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert blocks and not any(block.training for block in blocks), "blocks are back in eval mode"
    if family == "opt":
        assert all(block.dropout == 0.1 for block in blocks), "their own dropout is back"


@pytest.mark.parametrize("method", [IA3(), LoRA(rank=2, dora=True), PrefixTuning(length=3), Bottleneck(reduction=8)])
@each_family
def test_checkpointing_suits_other_methods_or_says_no(family: str, method: Method) -> None:
    base = tuned(family, method)
    rows, found = rows_for(base, 4), []
    for on in (False, True):
        settings = TrainingSettings(gradient_checkpointing=on)
        run = lambda settings=settings: loop._gradients(  # noqa: E731
            base, "t", rows, settings, loop.Progress(micro_batch_tokens=60), lambda event: None
        )
        if on and isinstance(method, PrefixTuning) and not base.packs:
            with pytest.raises(UserError, match=f"blocks of a {family} model do not see a prefix"):
                run()
            return
        run()
        found.append(gradients(base))
    assert same(found[0], found[1]) and found[0]


def test_checkpointing_runs_each_block_again(monkeypatch: pytest.MonkeyPatch) -> None:
    base, calls = tuned(), Counter[int]()
    for place, block in enumerate(base.model.model.layers):
        block.mlp.register_forward_pre_hook(lambda *_, place=place: calls.update([place]))
    rows = rows_for(base, 3)
    assert base.blocks == 2
    for share, expected in ((False, [1, 1]), (True, [2, 2]), (0.5, [2, 1]), (0.51, [2, 2]), (0.0, [1, 1])):
        calls.clear()
        settings = TrainingSettings(gradient_checkpointing=share)
        loop._gradients(base, "t", rows, settings, loop.Progress(micro_batch_tokens=500), lambda event: None)
        assert [calls[place] for place in range(2)] == expected


@each_family
def test_label_smoothing_is_torchs(family: str) -> None:
    base = tuned(family)
    rows = rows_for(base, 5)
    batch = collate(rows, base.decoder_start if base.encoder_decoder else None)
    torch.manual_seed(0)
    found = loss_sum(base, batch, 0.2)
    torch.manual_seed(0)
    logits = base.logits(target_states(base, batch)).float()
    expected = F.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, F.cross_entropy(logits, batch.labels, reduction="sum"))


@each_family
@pytest.mark.parametrize("method", [LoRA(rank=2), Full()], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_head_taken_in_parts_gives_the_loss_and_gradients_of_the_whole(
    family: str, method: Method, dtype: torch.dtype, monkeypatch
) -> None:
    base = tuned(family, method, dtype)
    batch = collate(rows_for(base, 5), base.decoder_start if base.encoder_decoder else None)
    found = []
    for most in (10**6, len(batch.labels) - 1, 3):
        monkeypatch.setattr("luthier.models.loss.CHUNK", most)
        monkeypatch.setattr("luthier.models.loss.BY_KERNELS", most)
        total = loss_sum(base, batch)
        (2 * total).backward()
        found.append({"loss": total.detach(), **gradients(base)})
    for parts in found[1:]:
        if dtype == torch.float32:
            torch.testing.assert_close(parts, found[0])
        for key, whole in found[0].items():  # sums of parts are rounded once more each
            assert (parts[key] - whole).norm() <= 0.02 * whole.norm(), key


def test_neftune_noise_has_its_spread_and_stays_in_training() -> None:
    torch.manual_seed(0)
    clean = torch.zeros(3000, 16)
    found = noisy(clean, (1000, 2000), 5.0)
    for part, length in ((found[:1000], 1000), (found[1000:], 2000)):
        edge = 5.0 / (length * 16) ** 0.5
        assert part.abs().max() <= edge
        assert part.std() == pytest.approx(edge / 3**0.5, rel=0.02)  # uniform between the edges
    base = tuned()
    rows = rows_for(base, 4)
    plain, _ = accumulate(base, rows, 500)
    noised, _ = loop._gradients(
        base, "t", rows, TrainingSettings(neftune=20.0), loop.Progress(micro_batch_tokens=500), lambda event: None
    )
    assert noised != pytest.approx(plain, rel=1e-6)
    assert base.embedding_noise == 0.0
    base.embedding_noise = 20.0
    batch = collate(rows, None)
    with torch.no_grad():
        assert torch.equal(target_states(base, batch), target_states(base, batch)), "scoring sees no noise"


def test_rates_by_pattern_depth_and_lora_plus() -> None:
    base = tiny.make("llama")
    attach(base, "t", LoRA(rank=2))
    keys = parameters(base, "t").keys()
    settings = TrainingSettings(rates={"*.q_proj.*": 3.0}, layer_decay=0.5, lora_plus=16.0)
    found = rate_factors(keys, settings, base.blocks)
    for key, factor in found.items():
        expected = (
            (0.5 if ".layers.0." in key else 1.0)
            * (3.0 if "q_proj" in key else 1.0)
            * (16.0 if "lora_B" in key else 1.0)
        )
        assert factor == expected, key
    attach(base, "full", Full())
    depth = rate_factors(parameters(base, "full"), TrainingSettings(layer_decay=0.5), base.blocks)
    assert depth["model.embed_tokens.weight"] == 0.25
    assert depth["model.norm.weight"] == 1.0
    with pytest.raises(UserError, match=r"the pattern '\*.k_prj.\*' matches none of the 28 parameters"):
        rate_factors(keys, TrainingSettings(rates={"*.k_prj.*": 2.0}), base.blocks)
    with pytest.raises(UserError, match="this tuning has none"):
        rate_factors(parameters(base, "full"), TrainingSettings(lora_plus=2.0), base.blocks)


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_a_factor_is_a_rate_of_its_own(kind: str) -> None:
    """Two parameters stepped together, one with a factor, move as two optimizers at two rates would move them."""
    draw = torch.Generator().manual_seed(0)
    start = {"slow": torch.randn(6, 5, generator=draw), "fast": torch.randn(6, 5, generator=draw)}
    steps = [{key: torch.randn(6, 5, generator=draw) for key in start} for _ in range(4)]

    def moved(keys: list[str], rate: float, factors: dict[str, float]) -> dict[str, torch.Tensor]:
        owned = {key: torch.nn.Parameter(start[key].clone()) for key in keys}
        optimizer = Optimizer(owned, 0.1, kind, factors)  # type: ignore[arg-type]
        for step in steps:
            for key, parameter in owned.items():
                parameter.grad = step[key].clone()
            optimizer.step(rate, 1e9)
        return owned

    together = moved(["slow", "fast"], 0.01, {"fast": 4.0})
    assert torch.equal(together["slow"], moved(["slow"], 0.01, {})["slow"])
    assert torch.equal(together["fast"], moved(["fast"], 0.04, {})["fast"])


def test_adafactor_is_torchs(tmp_path: Path) -> None:
    base = tuned(method=LoRA(rank=2))
    twin = {key: torch.nn.Parameter(value) for key, value in weights(base).items()}
    plain = torch.optim.Adafactor(twin.values(), lr=0.0)
    optimizer = Optimizer(parameters(base, "t"), 0.0, "adafactor")
    for step in range(3):
        accumulate(base, rows_for(base, 4 + step), 500)
        for key, parameter in parameters(base, "t").items():
            twin[key].grad = parameter.grad.clone()
        for group in plain.param_groups:
            group["lr"] = 0.02
        plain.step()
        optimizer.step(0.02, 1e9)
        assert same(weights(base), {key: value.detach() for key, value in twin.items()})
    state = optimizer.state()
    assert {key.partition("/")[0] for key in state} == {"step", "row_var", "col_var"}
    again = Optimizer(parameters(base, "t"), 0.0, "adafactor")
    again.restore({key: tensor.clone() for key, tensor in state.items()})
    assert all(torch.equal(tensor, again.state()[key]) for key, tensor in state.items())


def test_eight_bit_optimizers_say_where_they_work() -> None:
    with pytest.raises(UserError, match=r"work on CUDA devices. Use `optimizer: adamw` or adafactor"):
        Optimizer({"x": torch.nn.Parameter(torch.ones(2))}, 0.0, "adamw_8bit")


@pytest.mark.parametrize("extra", [{"optimizer": "adafactor"}, {"neftune": 5.0}, {"gradient_checkpointing": True}])
def test_with_each_choice_a_stopped_training_ends_in_the_same_bits(extra: dict, tmp_path: Path) -> None:
    settings = TrainingSettings(epochs=2, batch_size=4, learning_rate=1e-2, **extra)
    whole, stopped = tuned(), tuned()
    train(whole, "t", Shuffled(rows_for(whole), 0), settings, 0, tmp_path / "whole")
    seen: list[dict] = []
    with pytest.raises(Interrupted):
        train(
            stopped, "t", Shuffled(rows_for(stopped), 0), settings, 0, tmp_path / "part",
            hooks=[seen.append], should_stop=lambda: len(seen) == 5,
        )  # fmt: skip
    again = tuned()
    train(again, "t", Shuffled(rows_for(again), 0), settings, 0, tmp_path / "part")
    assert same(weights(again), weights(whole))


def test_what_is_watched_decides_which_weights_are_kept(tmp_path: Path) -> None:
    base = tuned()
    found = iter(
        [
            Validation(3.0, 0.1, {"rouge1": 0.2}),
            Validation(1.0, 0.3, {"rouge1": 0.4}),
            Validation(2.0, 0.2, {"rouge1": 0.6}),
        ]
    )
    settings = TrainingSettings(max_steps=6, batch_size=4, validate_every=2, watch="rouge1")
    progress = train(base, "t", Shuffled(rows_for(base), 0), settings, 0, tmp_path, validate=lambda: next(found))
    assert (progress.best_step, progress.best) == (6, 0.6)
    told = [event for event in progress.history if "validation_loss" in event]
    assert [event["validation_rouge1"] for event in told] == [0.2, 0.4, 0.6]


@pytest.mark.parametrize("halve", [False, True])
def test_where_memory_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halve: bool) -> None:
    """Micro-batches of more than 150 tokens do not fit: halved they do, and the weights are those of 150 from the start."""
    plain = loop.loss_sum

    def small(base: BaseModel, batch, smoothing: float):
        if batch.tokens > 150:
            raise torch.OutOfMemoryError("no memory")
        return plain(base, batch, smoothing)

    expected, base = tuned(), tuned()
    run = lambda one, **given: train(  # noqa: E731
        one,
        "t",
        Shuffled(rows_for(one), 0),
        TrainingSettings(epochs=1, batch_size=16, **given),
        0,
        tmp_path / str(given),
    )
    run(expected, micro_batch_tokens=150)
    monkeypatch.setattr(loop, "loss_sum", small)
    if not halve:
        with pytest.raises(
            UserError, match=r"ran out of memory with micro-batches of 600 tokens.*halve_out_of_memory: true"
        ):
            run(base, micro_batch_tokens=600)
        return
    progress = run(base, micro_batch_tokens=600, halve_out_of_memory=True)
    assert progress.micro_batch_tokens == 150
    assert [event["micro_batch_tokens"] for event in progress.history if "micro_batch_tokens" in event] == [300, 150]
    assert same(weights(base), weights(expected))
    smallest = tuned()
    monkeypatch.setattr(loop, "loss_sum", lambda *_: (_ for _ in ()).throw(RuntimeError("can't allocate memory: x")))
    with pytest.raises(UserError, match="ran out of memory with micro-batches of 75 tokens"):
        run(smallest, micro_batch_tokens=600, halve_out_of_memory=True)


def test_trackers_are_told_every_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from accelerate import tracking

    told: list[tuple] = []

    class Tracker:
        requires_logging_directory = False

        def __init__(self, run: str):
            told.append(("run", run))

        def start(self) -> None:
            told.append(("start",))

        def store_init_configuration(self, values: dict) -> None:
            told.append(("recipe", json.loads(values["recipe"])))

        def log(self, values: dict, step: int) -> None:
            told.append((step, values))

        def finish(self) -> None:
            told.append(("finish",))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mine", Tracker)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["mine"])
    with tracker_hooks(["mine"], "lora", tmp_path, {"seed": 3}) as (tell,):
        tell({"step": 4, "loss": 1.5, "tokens": 20})
    assert told == [("run", "lora"), ("start",), ("recipe", {"seed": 3}), (4, {"loss": 1.5, "tokens": 20}), ("finish",)]
    with (
        pytest.raises(UserError, match="unknown tracker 'min'. Did you mean 'mine'"),
        tracker_hooks(["min"], "x", tmp_path, {}),
    ):
        pass
    with pytest.raises(UserError, match="'wandb' is not installed"), tracker_hooks(["wandb"], "x", tmp_path, {}):
        pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"gradient_checkpointing": 1.5}, "gradient_checkpointing is 1.5"),
        ({"neftune": -1.0}, "neftune is -1.0"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0"),
        ({"rates": {"x": -1.0}}, "the factor -1.0 of 'x'"),
        ({"lora_plus": 0.0}, "lora_plus is 0.0"),
        ({"shard": True, "frozen_cache": True}, "frozen_cache runs on whole weights"),
        ({"shard": True, "halve_out_of_memory": True}, "halve_out_of_memory is decided by each process"),
        ({"shard": True, "optimizer": "adafactor"}, "adafactor needs whole matrices; with shard use adamw"),
        ({"shard": True, "snapshots": 2}, "snapshots are scored on whole weights"),
    ],
)
def test_wrong_values_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**given)


@pytest.mark.parametrize(
    ("family", "method", "still"),
    [
        ("llama", PrefixTuning(length=2, reparametrise=True, hidden=4), {"embedding"}),
        ("llama", PrefixTuning(length=2), {"prompt_embeddings"}),
        ("t5", Full(), {f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for side in ("encoder", "decoder")}),
        ("llama", LoRA(rank=2), set()),
    ],
)  # fmt: skip
def test_decay_spares_what_need_not_be_near_zero(family: str, method: Method, still: set[str]) -> None:
    """Without gradients in the way, one step of decay scales every matrix and nothing else."""
    base = tuned(family, method)
    owned = parameters(base, "t")
    with torch.no_grad():
        for parameter in owned.values():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    Optimizer(owned, weight_decay=0.5).step(0.1, 1.0)
    unmoved = {key for key, parameter in owned.items() if torch.equal(parameter, torch.ones_like(parameter))}
    assert unmoved == still | {key for key, parameter in owned.items() if parameter.ndim < 2}
