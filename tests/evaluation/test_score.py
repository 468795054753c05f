"""Answers, losses and choices against slow readings of the same model."""

import math
import random
from pathlib import Path

import pytest
import torch
from tests import tiny

from luthier.data.task import Example
from luthier.directory import Answers
from luthier.encoding.encoder import Encoder
from luthier.evaluation import score
from luthier.evaluation.score import answer, loss_and_accuracy, losses, measure
from luthier.models.base import BaseModel
from luthier.models.decoding import Decoding
from luthier.models.generate import generate
from luthier.tuning import LoRA, attach, low_rank

FAMILIES = ("llama", "gpt2", "opt", "t5")


def encoder_of(base: BaseModel) -> Encoder:
    return Encoder(base.tokenizer, encoder_decoder=base.encoder_decoder, chat=False, max_length=128)


def examples(count: int, choices: bool = False) -> list[Example]:
    draw = random.Random(0)
    return [
        Example(
            str(number),
            tiny.words(draw, 2, 12),
            "yes",
            ("yes", "maybe"),
            ("yes", "no", "one two three") if choices else (),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_prompt_that_fills_the_window_leaves_room_for_the_longest_choice(family: str) -> None:
    base = tiny.make(family)
    encoder = Encoder(base.tokenizer, encoder_decoder=False, chat=False, max_length=base.context)
    long = Example("0", "yes no " * 800, "yes", ("yes",), ("yes", "one two three four five six " * 9))
    found = answer(base, encoder, [long], 1)[0]
    longest = len(encoder.target_ids(long.choices[1]))
    assert found.prompt_tokens == base.context - longest and found.prediction in long.choices


def own_logits(base: BaseModel, prompt: list[int], target: list[int]) -> torch.Tensor:
    """Logits for each target token, from transformers' forward on this row alone."""
    with torch.no_grad():
        if base.encoder_decoder:
            return base.model(input_ids=torch.tensor([prompt]), labels=torch.tensor([target])).logits[0]
        base.model.set_attn_implementation("eager")
        return base.model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("by", ["mean", "sum"])
@pytest.mark.parametrize("family", FAMILIES)
def test_choices_are_the_most_probable(family: str, by: str) -> None:
    base, plain = tiny.make(family), tiny.make(family)
    encoder, rows = encoder_of(base), examples(9, choices=True)
    expected = []
    for row in rows:
        means = []
        for choice in row.choices:
            ids = encoder.target_ids(choice)[:-1]
            logits = own_logits(plain, encoder.prompt_ids(row), ids)
            means.append(float(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).__getattribute__(by)()))
        expected.append(row.choices[means.index(max(means))])
    found = answer(base, encoder, rows, 4, choice_scoring=by)
    assert [one.prediction for one in found] == expected
    assert len(set(expected)) > 1 or family == "opt" or by == "sum", (
        "one choice wins everywhere: the test could not fail"
    )
    scores = measure(found, ["accuracy"])
    assert scores["accuracy"].value == sum(text in ("yes", "maybe") for text in expected) / 9
    assert len(scores["accuracy"].values) == 9


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_the_models_own(family: str) -> None:
    base, plain = tiny.make(family), tiny.make(family)
    encoder = encoder_of(base)
    rows = [encoder.encode(example) for example in examples(6)]
    each, hits, count = [], 0, 0
    for row in rows:
        logits, target = own_logits(plain, row.prompt, row.target), torch.tensor(row.target)
        each.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
        hits += int((logits.argmax(-1) == target).sum())
        count += len(target)
    loss, accuracy = loss_and_accuracy(base, rows)
    assert loss == pytest.approx(float(torch.cat(each).mean()), rel=1e-5)
    assert accuracy == hits / count
    found = losses(base, rows, ["loss", "perplexity"])
    assert found["loss"].values.tolist() == pytest.approx([float(one.mean()) for one in each], rel=1e-5)
    assert found["loss"].value == pytest.approx(found["loss"].values.mean())
    assert found["perplexity"].value == pytest.approx(math.exp(float(torch.cat(each).mean())), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_keep_the_order_given(family: str) -> None:
    base = tiny.make(family)
    encoder, rows = encoder_of(base), examples(11)
    told: list[tuple[int, int]] = []
    found = answer(base, encoder, rows, 6, tell=lambda done, of: told.append((done, of)))
    assert [one.id for one in found] == [row.id for row in rows]
    assert told[-1] == (11, 11)
    for row, one in zip(rows, found, strict=True):
        ids = generate(base, [encoder.prompt_ids(row)], 6, encoder.stops)[0]
        assert one.prediction == encoder.decode(ids)


@pytest.mark.parametrize("choices", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_that_were_known_are_not_computed_again(
    family: str, choices: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.evaluation.score.EVALUATION_TOKENS", 60)
    base, rows = tiny.make(family), examples(11, choices)
    encoder, warm = encoder_of(base), Decoding(temperature=1.5, batch_size=4)
    expected = answer(base, encoder, rows, 4, decoding=warm)

    class Killed(Exception):
        pass

    def keep_and_die(found: dict[int, str]) -> None:
        if len(answers.known()) >= 4:
            raise Killed
        answers.keep(found)

    answers = Answers(tmp_path / "predictions" / "lora.partial")
    with pytest.raises(Killed):
        answer(base, encoder, rows, 4, decoding=warm, known=answers.known(), keep=keep_and_die)
    known = answers.known()
    assert 4 <= len(known) < 11
    with answers.path.open("ab") as file:  # a kill in the middle of a line
        file.write('{"place": 10, "prediction": "caf\u00e9'.encode()[:-1])
    again: list[int] = []

    def keep(found: dict[int, str]) -> None:
        again.extend(found)
        answers.keep(found)

    found = answer(base, encoder, rows, 4, decoding=warm, known=answers.known(), keep=keep)
    assert found == expected
    assert sorted([*known, *again]) == list(range(11)), "each once"
    assert answers.known() == {place: one.prediction for place, one in enumerate(expected)}


def test_answers_of_several_processes_are_known_together(tmp_path: Path) -> None:
    first, second = (Answers(tmp_path / "lora.partial", rank) for rank in range(2))
    other = Answers(tmp_path / "lora.kept.partial")
    for one, found in ((first, {0: "a"}), (second, {7: "b"}), (other, {0: "c"})):
        one.keep(found)
    with second.path.open("ab") as file:  # a kill in the middle of a line
        file.write(b'{"place": 8')
    assert Answers(tmp_path / "lora.partial").known() == {0: "a", 7: "b"}
    first.forget()
    assert [path.name for path in tmp_path.iterdir()] == ["lora.kept.partial"]


@pytest.mark.parametrize("choices", [False, True])
def test_a_tunings_tensors_are_derived_once_for_all_batches(choices: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.make("llama", torch.bfloat16)
    attach(base, "t", LoRA(rank=2))
    base.use("t")
    derived: list[object] = []
    by_column = low_rank._by_column
    monkeypatch.setattr(low_rank, "_by_column", lambda *given: (derived.append(given), by_column(*given))[1])
    monkeypatch.setattr(score, "EVALUATION_TOKENS", 1)
    kept: list[dict[int, str]] = []
    answer(base, encoder_of(base), examples(3, choices), 2, keep=kept.append, decoding=Decoding(batch_size=1))
    assert len(kept) == 3 and len(derived) == 14
