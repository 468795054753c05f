"""The loop against a slow twin, its choices, and what stops it."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from tests import tiny

from luthier.encoding.batches import collate
from luthier.encoding.encoder import Encoded
from luthier.encoding.order import Mixed, Shuffled, Stream, step_rows
from luthier.errors import Interrupted, UserError
from luthier.models.base import BaseModel
from luthier.models.loss import label_scores
from luthier.models.run import target_states
from luthier.training.checkpoint import read_checkpoint
from luthier.training.loop import Validation, train
from luthier.training.optimizer import Optimizer, scattered
from luthier.training.settings import TrainingSettings
from luthier.tuning import (
    IA3,
    Bottleneck,
    Full,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    Selective,
    attach,
    parameters,
)

METHODS: dict[str, Method] = {
    "full": Full(),
    "lora": LoRA(rank=2, dropout=0.1),
    "prompt_tuning": PromptTuning(length=3),
    "prefix_tuning": PrefixTuning(length=3, reparametrise=True, hidden=4),
    "dora": LoRA(rank=2, dora=True),
    "selective": Selective(targets=["layernorm", "head"], untie=True),
    "bottleneck": Bottleneck(reduction=8),
    "ia3": IA3(),
}
each_method = pytest.mark.parametrize("method", METHODS)


def rows_for(base: BaseModel, count: int = 21) -> list[Encoded]:
    draw = random.Random(0)
    top = base.embedding.weight.shape[0] - 1
    tokens = lambda least, most: [draw.randint(3, top) for _ in range(draw.randint(least, most))]  # noqa: E731
    return [Encoded(f"row {number}", tokens(4, 16), tokens(2, 6)) for number in range(count)]


def weights(base: BaseModel, name: str = "t") -> dict[str, torch.Tensor]:
    return {key: parameter.detach().clone() for key, parameter in parameters(base, name).items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[key], theirs[key]) for key in theirs) and ours.keys() == theirs.keys()


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_training_equals_a_plain_loop(family: str, tmp_path: Path) -> None:
    """Same rows, a plain AdamW and torch's own clipping and loss, one row at a time."""
    settings = TrainingSettings(epochs=2, batch_size=4, learning_rate=3e-3, micro_batch_tokens=40, clip=0.5)
    base, twin = tiny.make(family), tiny.make(family)
    attach(base, "t", LoRA(rank=2), seed=1)
    attach(twin, "t", LoRA(rank=2), seed=1)
    rows = rows_for(base)
    train(base, "t", Shuffled(rows, 7), settings, 7, tmp_path)

    twin.use("t")
    owned = list(parameters(twin, "t").values())
    plain = torch.optim.AdamW(owned, lr=0.0, weight_decay=0.0)
    steps = settings.steps(len(rows))
    assert steps == 12
    for step in range(steps):
        batch = step_rows(Shuffled(rows, 7), 4, step)
        count = sum(len(row.target) for row in batch)
        for row in batch:
            single = collate([row], twin.decoder_start if twin.encoder_decoder else None).to(twin.device)
            logits = twin.logits(target_states(twin, single))
            (torch.nn.functional.cross_entropy(logits, single.labels, reduction="sum") / count).backward()
        torch.nn.utils.clip_grad_norm_(owned, 0.5)
        for group in plain.param_groups:
            group["lr"] = settings.rate(step, steps, 3e-3)
        plain.step()
        plain.zero_grad()
    for key, tensor in weights(twin).items():
        torch.testing.assert_close(weights(base)[key], tensor, atol=2e-5, rtol=1e-3)


@each_method
@pytest.mark.parametrize(("dtype", "mixed"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_stopped_and_resumed_ends_in_the_same_bits(
    method: str, dtype: torch.dtype, mixed: bool, tmp_path: Path
) -> None:
    settings = TrainingSettings(epochs=2, batch_size=4, checkpoint_every=2)

    def fresh() -> BaseModel:
        base = tiny.make("llama", dtype)
        attach(base, "t", METHODS[method], seed=1)
        return base

    def validation(base: BaseModel):
        held = collate(rows_for(base, 3), None).to(base.device)
        return lambda: Validation(-float(label_scores(base, held)[0].mean()), 0.0)

    def stream() -> Stream:  # made anew, as a new process does
        return Mixed([rows[:13], rows[13:]], [0.7, 0.3], len(rows), 3) if mixed else Shuffled(rows, 3)

    whole = fresh()
    rows = rows_for(whole)
    straight = train(whole, "t", stream(), settings, 3, tmp_path / "whole", validate=validation(whole))
    for stop_at in (1, 5, 6, 11):
        folder = tmp_path / f"stop{stop_at}"
        first, seen = fresh(), [0]

        def count(event: dict, seen: list[int] = seen) -> None:
            seen[0] = event["step"]

        with pytest.raises(Interrupted, match=f"after step {stop_at} of 12"):
            train(
                first, "t", stream(), settings, 3, folder, validate=validation(first), hooks=[count],
                should_stop=lambda seen=seen, stop_at=stop_at: seen[0] >= stop_at,
            )  # fmt: skip
        torch.manual_seed(999)  # whatever the new process's generator holds
        second = fresh()
        progress = train(second, "t", stream(), settings, 3, folder, validate=validation(second))
        assert same(weights(second), weights(whole))
        without_time = [
            [{key: value for key, value in event.items() if key != "step_seconds"} for event in one.history]
            for one in (progress, straight)
        ]
        assert without_time[0] == without_time[1]


def test_checkpoints_hold_optimizer_and_masters_to_the_bit(tmp_path: Path) -> None:
    base = tiny.make("llama", torch.bfloat16)
    attach(base, "t", Full())
    settings = TrainingSettings(epochs=1, batch_size=4, checkpoint_every=3, learning_rate=1e-6, warmup=0.0)
    with pytest.raises(Interrupted):
        train(base, "t", Shuffled(rows_for(base), 0), settings, 0, tmp_path, should_stop=lambda: True)
    _, saved, state = read_checkpoint(tmp_path / "checkpoint.safetensors")
    assert same(saved, {key: one.cpu() for key, one in weights(base).items()})
    moved = [key for key in saved if not torch.equal(state[f"master/{key}"], saved[key].float())]
    assert len(moved) > len(saved) // 2, "an update below bfloat16's spacing must survive in the master"
    start = {key: scattered(base.grafts.originals[key], key).cpu() for key in saved}
    moved = [key for key in saved if not torch.equal(state[f"master/{key}"], start[key])]
    assert len(moved) > len(saved) // 2, "and it did move from where masters start"
    assert {f"exp_avg/{key}" for key in saved} | {f"exp_avg_sq/{key}" for key in saved} <= state.keys()


def test_the_best_weights_are_kept_and_early_stopping_ends(tmp_path: Path) -> None:
    base = tiny.make("llama")
    attach(base, "t", LoRA(rank=2))
    losses = iter([3.0, 1.0, 2.0, 2.0, 0.5])
    kept: list[dict] = []

    def validate() -> Validation:
        kept.append(weights(base))
        return Validation(next(losses), 0.5)

    settings = TrainingSettings(max_steps=20, batch_size=4, validate_every=2, early_stopping=2)
    progress = train(base, "t", Shuffled(rows_for(base), 0), settings, 0, tmp_path, validate=validate)
    assert (progress.step, progress.best_step, progress.best) == (8, 4, -1.0)
    assert same(weights(base), kept[1])
    assert not same(kept[1], kept[3])


def test_a_loss_that_is_no_number_names_step_and_rows(tmp_path: Path) -> None:
    base = tiny.make("llama")
    attach(base, "t", LoRA(rank=2))
    with torch.no_grad():
        next(iter(parameters(base, "t").values()))[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"broke at step 1 of 6: the loss is nan.*row \d+, row \d+") as caught:
        train(base, "t", Shuffled(rows_for(base), 0), TrainingSettings(epochs=1, batch_size=4), 0, tmp_path)
    assert "learning_rate" in str(caught.value)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_warms_up_and_decays(schedule: str) -> None:
    settings = TrainingSettings(warmup=0.1, schedule=schedule)
    rates = [settings.rate(step, 100, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert max(rates) == 2.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert rates[-1] == {"linear": pytest.approx(2 / 90), "constant": 2.0}.get(schedule, pytest.approx(0.0, abs=1e-3))


def test_decay_pulls_matrices_only() -> None:
    parameters_ = {"matrix": torch.nn.Parameter(torch.ones(2, 2)), "norm": torch.nn.Parameter(torch.ones(2))}
    for parameter in parameters_.values():
        parameter.grad = torch.zeros_like(parameter)
    Optimizer(parameters_, weight_decay=0.5).step(0.1, 1.0)
    assert parameters_["matrix"].tolist() == [[pytest.approx(0.95)] * 2] * 2
    assert parameters_["norm"].tolist() == [1.0, 1.0]
