"""Every method and every start learns, on tiny bases that were taught to follow a word of instruction first."""

import copy
import random
from pathlib import Path

import pytest
from tests import tiny

from luthier.data.task import Example
from luthier.encoding.encoder import Encoder
from luthier.encoding.order import Shuffled
from luthier.evaluation.score import answer
from luthier.models.base import BaseModel
from luthier.training.loop import train
from luthier.training.settings import TrainingSettings
from luthier.tuning import IA3, Bottleneck, Full, LoRA, Method, PrefixTuning, PromptTuning, Selective, attach

NAMES = ["red", "blue", "green", "one", "two", "three"]
TEXT = "say the second word"
# On six-word answers and a base this small, rates are some ten times those for real bases.
METHODS: dict[str, tuple[Method, float]] = {
    "full": (Full(), 3e-3),
    "selective": (Selective(targets=["layernorm", "last-1-block"]), 1e-2),
    "lora": (LoRA(rank=8), 1e-2),
    "dora": (LoRA(rank=8, dora=True), 1e-2),
    "bottleneck": (Bottleneck(placement="houlsby", reduction=2), 1e-2),
    "ia3": (IA3(), 1e-1),
    "prompt-random": (PromptTuning(length=10, init="random"), 3e-1),
    "prompt-vocabulary": (PromptTuning(length=10, init="vocabulary"), 3e-1),
    "prompt-text": (PromptTuning(length=10, init_text=TEXT), 3e-1),
    "prompt-labels": (PromptTuning(length=10, init="class_labels", labels=NAMES), 3e-1),
    "prefix-random": (PrefixTuning(length=10, init="random"), 1e-1),
    "prefix-vocabulary": (PrefixTuning(length=10, init="vocabulary"), 1e-1),
    "prefix-text": (PrefixTuning(length=10, init_text=TEXT), 1e-1),
    "prefix-network": (PrefixTuning(length=10, init_text=TEXT, reparametrise=True, hidden=32), 1e-2),
}


def pairs() -> list[tuple[str, str]]:
    draw = random.Random(0)
    return [(draw.choice(NAMES), draw.choice(NAMES)) for _ in range(240)]


def encoder_of(base: BaseModel) -> Encoder:
    return Encoder(base.tokenizer, encoder_decoder=base.encoder_decoder, chat=False, max_length=64)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseModel]:
    """Bases that answer with the second word after "clerk", else with the first.

    A random base knows nothing that a prompt could call forth.
    """
    bases = {}
    lessons = [
        Example(f"{n}{word}", f"{word}{a} {b}", f" {b if word == 'clerk ' else a}")
        for n, (a, b) in enumerate(pairs())
        for word in ("", "clerk ", "guest ")
    ]
    for family in ("t5", "llama"):
        base = tiny.make(family)
        attach(base, "first", Full())
        rows = [encoder_of(base).encode(lesson) for lesson in lessons]
        settings = TrainingSettings(max_steps=250, batch_size=16, learning_rate=3e-3)
        train(base, "first", Shuffled(rows, 0), settings, 0, tmp_path_factory.mktemp(family))
        base.use("first")
        bases[family] = BaseModel(copy.deepcopy(base.model), base.tokenizer)
    return bases


CASES = [("llama", name) for name in METHODS]
CASES += [("t5", name) for name in ("full", "lora", "ia3", "prompt-random", "prompt-text", "prefix-text")]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_method_and_every_start_learns(
    family: str, name: str, taught: dict[str, BaseModel], tmp_path: Path
) -> None:
    """Answer with the second word of the question: chance is low, a learner gets it."""
    base = BaseModel(copy.deepcopy(taught[family].model), taught[family].tokenizer)
    encoder = encoder_of(base)
    examples = [
        Example(str(n), f"{a} {b}", f" {b}", (b,), tuple(f" {one}" for one in NAMES))
        for n, (a, b) in enumerate(pairs())
    ]

    def accuracy() -> float:
        found = answer(base, encoder, examples[:60], 4)
        return sum(one.prediction.strip() == one.references[0] for one in found) / len(found)

    before = accuracy()
    method, rate = METHODS[name]
    attach(base, "t", method)
    settings = TrainingSettings(max_steps=80, batch_size=16, learning_rate=rate)
    rows = [encoder.encode(example) for example in examples]
    progress = train(base, "t", Shuffled(rows, 0), settings, 0, tmp_path)
    losses = [event["loss"] for event in progress.history]
    assert before < 0.5
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    # A prefix of a decoder reaches its attention to what it wrote, not to what the encoder read.
    assert accuracy() > before + (0.05 if (family, name) == ("t5", "prefix-text") else 0.4)
