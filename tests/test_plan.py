"""The plan counts what the real code holds, and reads no weights."""

import json
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from luthier.cli import app
from luthier.data.shots import choose_shots, with_shots
from luthier.encoding.batches import collate, collate_choices
from luthier.evaluation import score
from luthier.held_out import DRAWS_APART
from luthier.models import loss
from luthier.models.base import BaseModel
from luthier.models.dry_run import dry_run
from luthier.models.kernels.library import library
from luthier.models.ledger import Ledger
from luthier.models.loss import label_scores, loss_sum
from luthier.models.quantize import QuantizedLinear
from luthier.models.stored import Stored
from luthier.phases import PACKING, READING, _DryOptimizer, loading
from luthier.plan import _cheaper, plan
from luthier.recipe_file import make_recipe
from luthier.training.loop import _advice
from luthier.training.optimizer import Kind, Optimizer, master_bytes, state_bytes
from luthier.training.settings import TrainingSettings
from luthier.tuning import METHODS, Full, LoRA, Method, PrefixTuning, attach, parameters
from luthier.work import Work
from tests import tiny
from tests.tiny import DECODERS, ENCODER_DECODERS, UNPACKED
from tests.training.test_loop import rows_for


def kept(base: BaseModel, dry: bool) -> tuple[int, int]:
    """(bytes alive after a forward pass, the peak through the backward pass) without the weights."""
    base.use("t")
    rows = rows_for(tiny.make(base.family if base.family != "t5" else "t5"), 3)
    batch = collate(rows, base.decoder_start if base.encoder_decoder else None).to(base.device)
    ledger = Ledger()
    with ledger:
        ledger.hold(
            [*base.grafts.originals.values(), *base.model.buffers(), *parameters(base, "t").values()], "weights"
        )
        ledger.restart()
        if dry:
            with dry_run(base, torch.device("cpu")):
                loss = loss_sum(base, batch)
                alive = sum(ledger.live.values()) - ledger.live["weights"]
                loss.backward()
        else:
            loss = loss_sum(base, batch)
            alive = sum(ledger.live.values()) - ledger.live["weights"]
            loss.backward()
    return alive, ledger.peak - ledger.live["weights"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("method", [LoRA(rank=2), Full(), PrefixTuning(length=3)], ids=lambda one: one.method)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_dry_run_counts_the_bytes_that_a_real_one_holds(
    family: str, method: Method, dtype: torch.dtype, tmp_path: Path
) -> None:
    real = tiny.make(family, dtype)
    attach(real, "t", method)
    with torch.device("meta"):
        shape = type(real.model)(real.config).to(dtype)
    skeleton = BaseModel(shape, real.tokenizer)
    attach(skeleton, "t", method)
    # GPT-2's layer norms keep their statistics in bf16 on a CPU, in fp32 elsewhere: 0.6 % at this width.
    assert kept(skeleton, dry=True) == pytest.approx(kept(real, dry=False), rel=1e-2)


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_optimizer_states_follow_their_formula(kind: Kind, dtype: torch.dtype) -> None:
    base = tiny.make("llama", dtype)
    attach(base, "t", Full())
    owned = parameters(base, "t")
    for parameter in owned.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer = Optimizer(owned, 0.0, kind)
    optimizer.step(1e-3, 1.0)
    held = sum(tensor.numel() * tensor.element_size() for tensor in optimizer.state().values())
    assert sum(master_bytes(one) + sum(state_bytes(one, kind)) for one in owned.values()) == held


def held(tensors: Iterable[torch.Tensor]) -> int:
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


EVERY = list(METHODS)
FAMILIES = {
    family: EVERY if family in ("llama", "t5") else ["lora"] for family in (*DECODERS, *ENCODER_DECODERS, *UNPACKED)
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_can_be_planned_on_every_family(family: str, content: dict, tmp_path: Path) -> None:
    real = tiny.make(family)
    real.config.save_pretrained(tmp_path)
    real.tokenizer.save_pretrained(tmp_path)
    more = {"few_shot": {"shots": "full"}, "interpolate": {"of": "lora"}}
    tunings = {method: more.get(method, {}) for method in FAMILIES[family]}
    found = plan(make_recipe({**content, "base": {**content["base"], "model": str(tmp_path)}, "tunings": tunings}))
    base_bytes = held([*real.model.parameters(), *real.model.buffers()])
    for name, one in found.items():
        assert one.fits and one.peak_bytes == sum(one.phases[one.phase].values())
        assert one.peak_bytes == max(sum(parts.values()) for parts in one.phases.values())
        assert all(count >= 0 for parts in one.phases.values() for count in parts.values())
        own = one.file_bytes
        assert one.phases["answering"]["weights"] == pytest.approx(base_bytes + own, abs=4096), name
        assert ("training" in one.phases) == hasattr(METHODS[name], "defaults")
        if "training" in one.phases:
            assert one.phases["training"]["gradients"] <= own  # the peak may be before the last of them is there
            assert one.phases["training"]["optimizer states"] == pytest.approx(2 * own, rel=0.1)
    trained = [one.phases["training"]["gradients"] for one in found.values() if "training" in one.phases]
    assert sum(map(bool, trained)) >= len(trained) // 2, "of few parameters the peak may be before the first gradient"


def test_beams_multiply_the_cache_and_a_text_metric_is_watched_with_the_optimizer_there(content: dict) -> None:
    recipe = {**content, "tunings": {"lora": {}}}
    greedy = plan(make_recipe(recipe))["lora"].phases["answering"]
    training = {**content["training"], "watch": "exact_match"}
    beams = plan(make_recipe({**recipe, "decoding": {"beams": 3}, "training": training}))["lora"].phases
    assert "answering" not in beams
    assert beams["validation answers"]["caches"] == pytest.approx(3 * greedy["caches"], rel=0.01)
    assert beams["validation answers"]["optimizer states"] == beams["training"]["optimizer states"] > 0


def test_answers_that_do_not_fit_are_written_fewer_at_a_time(content: dict) -> None:
    task = {**content["task"], "test": 16, "max_new_tokens": 500}
    recipe = {**content, "task": task, "max_length": 1024, "tunings": {"zero_shot": {}}}
    found = plan(make_recipe(recipe), available=1)["zero_shot"]
    assert found.phase == "answering" and found.choices[0].change == "decoding.batch_size=4"
    fewer = plan(make_recipe(recipe, [found.choices[0].change]))["zero_shot"]
    assert fewer.peak_bytes == found.choices[0].peak_bytes < found.peak_bytes
    assert fewer.phases["answering"]["caches"] == pytest.approx(found.phases["answering"]["caches"] / 4, rel=0.2)


def test_answers_after_a_training_are_planned_without_what_the_training_held(content: dict) -> None:
    found = plan(make_recipe({**content, "training": {**content["training"], "micro_batch_tokens": 4096}}))
    held = {name: sum(one.phases["answering"].values()) for name, one in found.items()}
    trained = sum(found["full"].phases["training"].values())
    weights = {name: one.phases["answering"]["weights"] for name, one in found.items()}
    assert held["full"] - weights["full"] == pytest.approx(held["zero_shot"] - weights["zero_shot"], rel=0.05)
    assert held["full"] < trained


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("plan")
    base = tiny.make("llama")
    base.config.save_pretrained(folder / "llama")  # no weights at all
    base.config.architectures = ["LlamaForCausalLM"]
    base.tokenizer.save_pretrained(folder / "llama")
    rows = [{"text": f"room {n} and {n}" * 6, "who": "Anna"} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "name": "who",
        "template": "Who: {{ text }} ||| {{ who }}",
        "train": "rows.jsonl",
        "validation": 2,
        "test": 2,
    }
    return {
        "base": {"model": str(folder / "llama"), "dtype": "float32"},
        "data": str(folder), "task": task, "retention": [], "max_length": 128,
        "training": {"max_steps": 2, "micro_batch_tokens": 256},
        "tunings": {"zero_shot": {}, "full": {}},
    }  # fmt: skip


def test_a_plan_reads_no_weights_and_its_advice_lowers_the_peak(content: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's folder holds no weights, so nothing could be loaded."""
    monkeypatch.setattr("luthier.plan.WORTH", 1.0)  # beside what libraries hold, all of a tiny model is little
    found = plan(make_recipe(content), available=0)
    for one in found.values():
        peaks = {phase: sum(parts.values()) for phase, parts in one.phases.items()}
        assert peaks[one.phase] == one.peak_bytes == max(peaks.values()) and not one.fits
        assert one.phases["answering"]["caches"] > 0
        assert all(choice.peak_bytes < one.peak_bytes for choice in one.choices)
    assert found["zero_shot"].file_bytes == 0 < found["full"].file_bytes
    weights = {name: one.phases["validation"]["weights"] for name, one in found.items()}
    assert weights["full"] == pytest.approx(2 * weights["zero_shot"], rel=1e-2)  # the frozen base, and what is trained
    advised = {choice.change for choice in found["full"].choices}
    assert {"training.micro_batch_tokens=64", "training.gradient_checkpointing=true"} <= advised
    assert {"training.optimizer=adafactor", "tunings.full.method=lora"} <= advised
    assert (
        "training.micro_batch_tokens=64 --set training.gradient_checkpointing=true" in found["full"].choices[-1].change
    )


def test_the_more_blocks_are_computed_again_the_less_is_kept(content: dict) -> None:
    """Of two blocks: both, the first, none."""
    tunings = {
        name: {"method": "full", "training": {"gradient_checkpointing": share}}
        for name, share in (("both", True), ("first", 0.5), ("none", False))
    }
    found = plan(make_recipe(content | {"tunings": tunings}))
    held = [found[name].phases["training"]["activations"] for name in tunings]
    assert held[0] < held[1] < held[2]


@pytest.mark.parametrize(("share", "more"), [(False, True), (0.5, True), (True, False)])
def test_all_blocks_are_advised_where_some_are_kept(share: float, more: bool) -> None:
    settings, row = TrainingSettings(gradient_checkpointing=share), rows_for(tiny.make("llama"), 1)
    assert ("gradient_checkpointing: true" in _advice("t", row, 2048, settings)) is more
    assert ("gradient_checkpointing" in _cheaper(settings, torch.device("cpu"))) is more


@pytest.mark.parametrize(
    "tuning",
    [{"method": "full"}, {"method": "selective", "targets": "last-1-block"}, {"method": "full", "training": {"shard": True, "snapshots": 0}}],
    ids=["full", "selective", "sharded"],
)  # fmt: skip
def test_each_advice_given_as_set_has_the_peak_that_was_promised(
    content: dict, tuning: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.plan.WORTH", 1.0)
    content = {**content, "tunings": {"t": tuning}}
    given = deepcopy(content)
    choices = plan(make_recipe(content), available=0)["t"].choices
    assert choices
    for choice in choices:
        found = plan(make_recipe(content, choice.change.split(" --set ")), available=0)["t"]
        assert found.peak_bytes == choice.peak_bytes, choice.change
        assert content == given, "changes are the recipe's, not the caller's"


def test_the_command_prints_a_plan_and_refuses_a_bad_recipe(content: dict, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(content))
    shown = CliRunner().invoke(app, ["plan", str(file)], env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    assert "full (full)" in shown.output and "fits" in shown.output
    assert max(map(len, shown.output.splitlines())) <= 80
    as_json = CliRunner().invoke(app, ["plan", str(file), "--json"])
    assert set(json.loads(as_json.stdout)) == set(content["tunings"])
    from luthier.errors import UserError

    with pytest.raises(UserError, match="does not exist"):
        CliRunner().invoke(app, ["plan", str(tmp_path / "none.yaml")], catch_exceptions=False)


def test_what_is_planned_of_shots_are_the_runs_own(content: dict, tmp_path: Path) -> None:
    """The prompts of the first batch, with the pairs that the run draws, as far as the context has room."""
    real = tiny.make("llama")
    real.config.save_pretrained(tmp_path)
    real.tokenizer.save_pretrained(tmp_path)
    tunings = {"asked": {"method": "zero_shot"}, "shown": {"method": "few_shot", "shots": 2, "draw": 3}}
    recipe = make_recipe({**content, "base": {**content["base"], "model": str(tmp_path)}, "tunings": tunings})
    base = BaseModel.skeleton(recipe.base)
    encoder = recipe.read_encoder().widened(base.context)
    task = recipe.tasks[0]
    examples = recipe.examples(task)
    shots = choose_shots(examples.train, 2, recipe.seed + DRAWS_APART * 3)
    budget = encoder.max_length - task.max_new_tokens
    expected = [encoder.prompt_ids(with_shots(one, shots, budget, encoder.count)) for one in examples.test]
    found = Work.of(recipe, "shown", base).prompts
    assert found and sorted(found) == sorted(expected)
    assert sum(map(len, found)) > 2 * sum(map(len, Work.of(recipe, "asked", base).prompts))


def test_a_planned_head_is_the_product_that_training_makes_of_it(
    content: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*given: object) -> None:
        raise AssertionError("the head was called as a module")

    monkeypatch.setattr(loss, "_by_autograd", called)
    content = {**content, "tunings": {"lora": {}, "full": {}}, "base": {**content["base"], "device": "cpu"}}
    for one in plan(make_recipe(content)).values():
        assert one.phases["training"]["logits"] > 0


def test_loading_counts_what_is_mapped_and_copied_at_once() -> None:
    """In another precision the copies and the file, all of it or one weight; in 4 bits what is not packed, once mapped and once copied."""
    plain, packed = tiny.make("llama"), tiny.make("llama", quantize="nf4")
    numbers = sum(one.numel() for one in plain.model.parameters())
    linears = [one for one in packed.model.modules() if isinstance(one, QuantizedLinear)]
    left = numbers - sum(one.weight.numel() for one in linears)
    kept = held([*plain.model.parameters(), *plain.model.buffers()])
    assert sum(loading(plain, Stored(torch.float32)).values()) == kept + READING
    buffers = held(plain.model.buffers())
    assert sum(loading(plain, Stored(torch.bfloat16)).values()) == numbers * (2 + 4) + READING
    half = tiny.make("llama", dtype=torch.bfloat16)
    assert sum(loading(half, Stored(torch.float32)).values()) == numbers * (4 + 2) + READING
    *others, last = [one.numel() for one in half.grafts.originals.values()]
    one_by_one = sum(loading(half, Stored(torch.float32, one_by_one=True)).values()) - READING
    assert numbers * 2 + last * 4 <= one_by_one <= numbers * 2 + max(others) * 4
    in_four_bits = held([*(one.packed for one in linears), *(one.state.absmax for one in linears)])
    found = loading(packed, Stored(torch.float32))
    assert found["weights"] == in_four_bits + left * 4 + buffers
    assert sum(found.values()) == found["weights"] + left * 4 + READING + PACKING


@pytest.mark.skipif(isinstance(library(), str), reason=f"no kernels: {library()}")
def test_only_without_kernels_are_16_bit_gradients_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def most() -> tuple[int, int]:
        base = tiny.make("llama", torch.bfloat16)
        shape = type(base.model)(base.config).to("meta", torch.bfloat16)
        skeleton = BaseModel(shape, base.tokenizer)
        attach(skeleton, "t", Full())
        owned = parameters(skeleton, "t")
        for parameter in owned.values():
            parameter.grad = torch.empty_like(parameter)
        ledger = Ledger()
        with dry_run(skeleton, torch.device("cpu")), ledger:
            optimizer = _DryOptimizer(owned, "adamw")
            ledger.restart()
            optimizer.step(ledger)
        copied = ledger.peak - sum(one.numel() for one in optimizer.states)
        return copied, 4 * sum(one.numel() for one in owned.values())

    assert most()[0] <= 0  # gradients were there before the ledger, and go
    monkeypatch.setattr("luthier.models.kernels.calls.library", lambda: "switched off")
    copied, expected = most()
    assert copied == expected


@pytest.mark.parametrize("family", ["llama", "t5", "opt"])
def test_ranking_is_planned_as_the_largest_group_that_scoring_ranks(
    family: str, content: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is written for a task that has choices; where a tuning is trained, it ranks validation rows with it."""
    real = tiny.make(family)
    real.config.save_pretrained(tmp_path)
    real.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(score, "EVALUATION_TOKENS", 60)
    task = {**content["task"], "validation": 5, "test": 7, "choices": "Anna ||| Bob ||| one two three"}
    tunings = {"asked": {"method": "zero_shot"}, "lora": {}}
    recipe = make_recipe(
        {**content, "task": task, "base": {**content["base"], "model": str(tmp_path)}, "tunings": tunings}
    )
    ranked: list[int] = []
    monkeypatch.setattr(
        score, "label_scores", lambda base, batch: (ranked.append(batch.tokens), label_scores(base, batch))[1]
    )
    examples = recipe.examples(recipe.tasks[0])
    for each in (examples.validation, examples.test):
        score.answer(real, recipe.read_encoder(), each, 1)
    base = BaseModel.skeleton(recipe.base)
    start = base.decoder_start if base.encoder_decoder else None
    planned = collate_choices(Work.of(recipe, "asked", base).choosing, start)[0]
    assert len(ranked) > 2 and planned.tokens == max(ranked)
    for name, one in plan(recipe).items():
        assert one.phases["choosing"]["activations"] > 0 and "answering" not in one.phases, name
