"""Several processes learn what one learns: same losses, weights and decisions, whatever their number."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests import tiny
from tests.training.rank_server import Together
from tests.training.server import asking
from tests.training.test_loop import rows_for

from luthier.directory import RunDirectory
from luthier.errors import UserError
from luthier.launched import Launched
from luthier.recipe import BASELINE
from luthier.recipe_file import make_recipe
from luthier.training.loop import check_ranks
from luthier.training.ranks import Ranks
from luthier.training.settings import TrainingSettings

Ask = Callable[[Together], list[str]]
each_method = pytest.mark.parametrize("method", ["lora", "full", "prompt_tuning"])
# Smooth ones: at a ReLU's kink the gradient jumps where weights differ by a rounding (seen with plain T5: losses equal to 1e-6, one
# step's norm 0.2 % apart).
each_family = pytest.mark.parametrize("family", ["llama", "t5-gated"])


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    with asking("tests.training.rank_server", GLOO_SOCKET_IFNAME="lo") as one:
        yield one


def learnt(folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    return json.loads((folder / "history.json").read_text()), load_file(folder / "learnt")


def same_to(one: Path, other: Path, tolerance: float) -> None:
    (ours, weights), (theirs, others) = learnt(one), learnt(other)
    assert len(ours) == len(theirs) > 10
    for mine, their in zip(ours, theirs, strict=True):
        norms = [one.pop("norm", 0.0) for one in (mine, their)]
        assert mine == pytest.approx(their, rel=tolerance, abs=tolerance), "losses, tokens and validations"
        assert norms[0] == pytest.approx(norms[1], rel=10 * tolerance)
    assert weights.keys() == others.keys()
    for key, tensor in weights.items():
        # Adam's first steps divide small gradients by themselves: single weights differ by more than the losses.
        difference = (tensor - others[key]).abs()
        assert difference.mean() < 5 * tolerance and difference.max() < 50 * tolerance


@pytest.fixture(scope="module")
def alone(ask: Ask, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of what one process learnt, which learns it once."""
    known: dict[str, Path] = {}

    def folder(**asked: Any) -> Path:
        key = json.dumps(asked, sort_keys=True)
        if key not in known:
            known[key] = tmp_path_factory.mktemp("alone")
            assert ask(Together(str(known[key]), **asked)) == [""]
        return known[key]

    return folder


@pytest.mark.parametrize("shard", [False, True], ids=["rows", "shard"])
@each_family
@each_method
def test_two_processes_learn_what_one_learns(
    method: str, family: str, shard: bool, ask: Ask, alone: Callable[..., Path], tmp_path: Path
) -> None:
    asked = {"method": method, "family": family}
    one, two, moved = alone(**asked), tmp_path / "two", tmp_path / "moved"
    assert ask(Together(str(two), **asked, size=2, shard=shard)) == ["", ""]
    same_to(two, one, 1e-5)
    # A checkpoint moves from one process to two, and back.
    for size, step in ((1, 3), (2, 7)):
        said = ask(Together(str(moved), **asked, size=size, shard=shard, stop_at=step))
        assert said == [f"Interrupted: Training 't' was stopped after step {step} of 10; its state is saved."] * size
    assert ask(Together(str(moved), **asked)) == [""]
    same_to(moved, one, 1e-5)


@pytest.mark.parametrize("shard", [False, True], ids=["rows", "shard"])
@pytest.mark.parametrize("method", ["ia3", "bottleneck", "prefix_tuning", "selective", "dora"])
def test_so_do_other_methods_on_three_processes_and_a_mixture(
    method: str, shard: bool, ask: Ask, alone: Callable[..., Path], tmp_path: Path
) -> None:
    # Three processes: parts of weights of four and of two rows are of unequal size, or empty.
    settings = {"gradient_checkpointing": shard}  # which runs, and so gathers, every block twice
    asked = Together(str(tmp_path), method, size=3, mixture=True, shard=shard, settings=settings)
    assert ask(asked) == ["", "", ""]
    same_to(tmp_path, alone(method=method, mixture=True), 1e-5)


STAGES = [BASELINE, "lora", "half", "full"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run that trains and scores: answers that are drawn, choices, losses; no time is measured in it."""
    folder = tmp_path_factory.mktemp("recipe")
    base = tiny.make("llama")
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    rows = [{"text": f"one asks about room {n}", "who": "one two"} for n in range(45)]
    for name, some in (("rows", rows), ("kept", rows[:8])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    kept = {"name": "kept", "template": "{{ text }} ||| {{ who }}", "test": "kept.jsonl", "choices": ["one two", "two"]}
    return {
        "base": {"model": str(folder / "base"), "dtype": "float32"},
        "data": str(folder),
        "task": {
            "name": "who", "template": "Who: {{ text }} ||| {{ who }}", "train": "rows.jsonl",
            "validation": 3, "test": 33, "max_new_tokens": 2, "metrics": ["rougeL", "loss"],
        },
        "retention": [kept],
        "decoding": {"temperature": 1.0},
        "training": {"max_steps": 3, "batch_size": 4},
        "tunings": {
            "lora": {"rank": 2}, "half": {"method": "interpolate", "of": "lora", "share": 0.5}, "full": {},
        },
    }  # fmt: skip


def test_a_run_on_two_processes_scores_what_one_scores(recipe: dict[str, Any], ask: Ask, tmp_path: Path) -> None:
    found = {}
    for how, size in (("one", 1), ("rows", 2), ("shard", 2)):
        made = make_recipe(recipe | {"training": recipe["training"] | {"shard": how == "shard"}})
        directory = RunDirectory.create(tmp_path / how, made, resume=False)
        assert ask(Together(str(directory.path), size=size, stages=STAGES)) == [""] * size
        found[how] = {stage: (directory.result(stage), directory.answers(stage)) for stage in STAGES}
    for stage, (result, answers) in found["one"].items():
        for how in ("rows", "shard"):
            other, others = found[how][stage]
            assert others == answers, f"{how}, {stage}: the same draws for the same rows"
            for task, scores in result["scores"].items():
                theirs = other["scores"][task]["metrics"]
                for metric, one in scores["metrics"].items():
                    assert theirs[metric]["value"] == pytest.approx(one["value"], rel=1e-5), (how, stage, task, metric)
            assert other["trainable_parameters"] == result["trainable_parameters"] if stage != BASELINE else True
            assert other["base"] == result["base"]
    for stage in STAGES[1:]:
        saved = [load_file(tmp_path / how / "tunings" / stage / "adapter_model.safetensors") for how in found]
        assert all(one.keys() == saved[0].keys() for one in saved)


@pytest.mark.parametrize(
    ("method", "shard", "dtype"),
    [("dropout", False, "float32"), ("dropout", True, "float32"), ("full", True, "bfloat16")],
)
def test_a_resumed_run_ends_in_the_same_bits_dropout_and_masters_too(
    method: str, shard: bool, dtype: str, ask: Ask, tmp_path: Path
) -> None:
    for name, stops in (("whole", [0]), ("resumed", [3, 7, 0])):
        for stop in stops:
            ask(Together(str(tmp_path / name), method, size=2, stop_at=stop, shard=shard, dtype=dtype))
    assert learnt(tmp_path / "whole")[0] == learnt(tmp_path / "resumed")[0]
    (_, ours), (_, theirs) = learnt(tmp_path / "whole"), learnt(tmp_path / "resumed")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    # Gathered tensor by tensor or not, it is a file as safetensors writes it.
    with safe_open(tmp_path / "resumed" / "checkpoint.safetensors", framework="pt") as file:
        shapes = {key: file.get_tensor(key).shape for key in file.keys()}  # noqa: SIM118 (no dict)
    assert all(
        shapes[f"weight.{key}"] == shapes[f"optimizer.exp_avg/{key}"] == one.shape for key, one in theirs.items()
    )
    assert any("master" in key for key in shapes) == (dtype == "bfloat16")


def test_one_gpu_for_several_processes_is_refused() -> None:
    process = Launched({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"})
    with pytest.raises(UserError, match="base.device is cuda:1, and 2 processes .* Set it to cuda or auto"):
        Ranks.join(process, "t", torch.device("cuda", 1))


def test_dropout_draws_anew_on_each_rank_in_each_step() -> None:
    assert len({Ranks(rank, 2).seed(3, step) for rank in range(2) for step in range(100)}) == 200


def test_a_batch_is_divided_whole_and_evenly() -> None:
    rows = rows_for(tiny.make("llama"), 40)
    for size in (1, 2, 3, 7):
        parts = Ranks(0, size).split(rows)
        assert sorted(row.id for part in parts for row in part) == sorted(row.id for row in rows)
        tokens = [sum(map(len, part)) for part in parts]
        assert max(tokens) - min(tokens) <= max(map(len, rows))
        assert Ranks(size - 1, size).split(rows) == parts, "every rank knows every rank's rows"


def test_a_batch_smaller_than_the_ranks_is_refused(ask: Ask, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size is 2 for 3 processes: .* Set it to 3 or more"):
        check_ranks(TrainingSettings(batch_size=2), 3)
    said = ask(Together(str(tmp_path / "x"), size=2, settings={"batch_size": 1}))
    assert len(said) == 2 and all(one.startswith("UserError: training.batch_size is 1") for one in said)
