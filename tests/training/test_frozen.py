"""Training from the states of frozen blocks is training from the rows."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.training.test_loop import rows_for

from luthier.data.stored import ExampleFile, StoredExamples, packed
from luthier.data.task import Example
from luthier.encoding.encoder import Encoder
from luthier.encoding.order import Shuffled
from luthier.encoding.stored import StoredRows, stored_rows
from luthier.errors import UserError
from luthier.models.base import BaseModel
from luthier.models.frozen import frozen_blocks
from luthier.training.frozen_rows import FrozenRows, frozen_rows
from luthier.training.loop import accumulate, train
from luthier.training.settings import TrainingSettings
from luthier.tuning import LoRA, Method, PrefixTuning, PromptTuning, Selective, attach, parameters

# Method, family, and the blocks that stay below it (of 3, of the decoder or the encoder).
CASES: dict[str, tuple[Method, str, int]] = {
    "lora on the last block": (LoRA(rank=2, layers=[2]), "llama", 2),
    "lora on the upper blocks": (LoRA(rank=2, layers=[1, 2]), "qwen2", 1),
    "the last block itself": (Selective(targets="last-1-blocks"), "mistral", 2),
    "the head": (Selective(targets="head", untie=True), "qwen3", 3),
    "t5's decoder": (LoRA(rank=2, targets=[r"decoder\..*\.(q|v)"]), "t5", 3),
    "gated t5's head": (Selective(targets="head", untie=True), "t5-gated", 3),
}
each_case = pytest.mark.parametrize("case", CASES)


def stored(base: BaseModel, folder: Path) -> StoredRows:
    """Rows on disk, as a recipe's are."""
    file = ExampleFile(folder, "train")
    words = ["one", "two", "red", "blue", "the cat", "Anna says hello."]
    for number in range(21):
        text = " ".join(words[(number * step) % 6] for step in range(1, 4 + number % 5))
        file.add(packed(Example(f"row {number}", text, words[number % 6])))
    file.close()
    encoder = Encoder(base.tokenizer, encoder_decoder=base.encoder_decoder, chat=False, max_length=100)
    return stored_rows(encoder, StoredExamples(folder, "train", 21), str(folder))


def prepared(case: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[BaseModel, StoredRows, int]:
    method, family, blocks = CASES[case]
    base = tiny.make(family, dtype, blocks=3)
    attach(base, "t", method, seed=1)
    folder.mkdir(exist_ok=True)
    return base, stored(base, folder), blocks


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_losses_and_gradients_are_those_of_the_rows(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, rows, blocks = prepared(case, tmp_path / "rows", dtype)
    assert frozen_blocks(base, "t") == blocks
    said: list[str] = []
    kept = frozen_rows(base, "t", rows, said.append)
    assert isinstance(kept, FrozenRows) and "frozen blocks take" in said[0]
    assert list(kept) == list(rows), "the rows themselves are the same"
    base.use("t")
    found = []
    for each in (list(rows), list(kept)):
        loss, _ = accumulate(base, each, 60)
        found.append((loss, {key: parameter.grad.clone() for key, parameter in parameters(base, "t").items()}))
        for parameter in parameters(base, "t").values():
            parameter.grad = None
    close = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-3, "rtol": 2e-2}
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5 if dtype == torch.float32 else 2e-3)
    torch.testing.assert_close(found[0][1], found[1][1], **close)


@each_case
def test_training_ends_in_the_same_weights(case: str, tmp_path: Path) -> None:
    settings = TrainingSettings(epochs=2, batch_size=4, learning_rate=1e-2, warmup=0.0)
    weights = []
    for frozen in (False, True):
        base, rows, _ = prepared(case, tmp_path / "rows")
        used = frozen_rows(base, "t", rows, lambda _: None) if frozen else rows
        train(base, "t", Shuffled(used, 0), settings, 0, tmp_path / f"{frozen}")
        weights.append({key: parameter.detach() for key, parameter in parameters(base, "t").items()})
    torch.testing.assert_close(weights[0], weights[1], atol=2e-4, rtol=1e-3)


def test_frozen_blocks_do_not_run_again_and_states_are_made_once(tmp_path: Path) -> None:
    base, rows, _ = prepared("lora on the last block", tmp_path / "rows")
    calls: list[int] = []
    for number, block in enumerate(base.model.model.layers):
        block.register_forward_pre_hook(lambda *_, n=number: calls.append(n))
    kept = frozen_rows(base, "t", rows, lambda _: None)
    assert set(calls) == {0, 1}
    calls.clear()
    said: list[str] = []
    again = frozen_rows(base, "t", rows, said.append)
    assert not calls and not said, "what was made is taken up"
    base.use("t")
    accumulate(base, list(again), 1000)
    assert set(calls) == {2}
    assert len(base.model.model.layers) == 3 and type(base.model.model.norm).__name__ == "LlamaRMSNorm"
    with torch.no_grad():  # another base makes states of its own
        base.model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    other, _, _ = prepared("lora on the last block", tmp_path / "rows")
    with torch.no_grad():
        other.model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    changed = BaseModel(other.model, other.tokenizer)
    attach(changed, "t", CASES["lora on the last block"][0], seed=1)
    fresh = frozen_rows(changed, "t", rows, lambda _: None)
    assert not torch.equal(fresh[0].states, kept[0].states)


@pytest.mark.parametrize(
    "method", [PromptTuning(length=2), PrefixTuning(length=2), LoRA(rank=2), Selective(targets="embeddings")]
)
def test_what_reaches_down_to_the_embeddings_keeps_nothing(method: Method, tmp_path: Path) -> None:
    base = tiny.make("qwen2", blocks=3)
    attach(base, "t", method)
    said: list[str] = []
    rows = stored(base, tmp_path)
    assert frozen_rows(base, "t", rows, said.append) is rows
    assert said == [
        "frozen_cache: this tuning reaches down to the embeddings, so nothing below it can be kept; it trains as without"
    ]
    gpt2 = tiny.make("gpt2", blocks=3)
    attach(gpt2, "t", LoRA(rank=2, layers=[2]))
    assert frozen_blocks(gpt2, "t") == 0, "a family that does more than run its blocks takes the plain path"


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, rows, _ = prepared("lora on the last block", tmp_path / "rows")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    with pytest.raises(
        UserError, match=r"the states of 21 rows after 2 frozen blocks take .* GB, and .* has 0.00 GB free"
    ):
        frozen_rows(base, "t", rows, lambda _: None)


def test_noise_on_the_rows_leaves_nothing_to_keep() -> None:
    with pytest.raises(ValueError, match="choose one"):
        TrainingSettings(neftune=1.0, frozen_cache=True)
    assert rows_for(tiny.make("llama"), 3)[0].states is None
