"""Chat logs: every answer is trained on, nothing else, and each behind the prompt it would have at inference."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import tiny

from luthier.data.formats.chat import read_conversation
from luthier.data.load import load_examples
from luthier.data.source import Source
from luthier.data.task import Example, Task
from luthier.encoding.audit import audit_text
from luthier.encoding.batches import collate, encode_all
from luthier.encoding.encoder import Encoder
from luthier.errors import UserError
from luthier.models.load import BaseSpec, read_tokenizer
from luthier.models.loss import loss_sum

TURNS = [("system", "Be kind."), ("user", "Hi?"), ("assistant", "Hello."), ("user", "Bye?"), ("assistant", "See you.")]
MESSAGES = {"messages": [{"role": role, "content": text} for role, text in TURNS]}
NAMES = {"user": "human", "assistant": "gpt", "system": "system"}
SHAREGPT = {"conversations": [{"from": NAMES[role], "value": text} for role, text in TURNS]}
ALPACA = {
    "instruction": "Bye?", "input": "", "output": "See you.", "system": "Be kind.", "history": [["Hi?", "Hello."]],
}  # fmt: skip


@pytest.mark.parametrize(("form", "row"), [("messages", MESSAGES), ("sharegpt", SHAREGPT), ("alpaca", ALPACA)])
def test_the_three_formats_say_the_same(form: str, row: dict) -> None:
    found = read_conversation(row, form, "row")
    assert found.system == "Be kind."
    assert found.exchanges == (("Hi?", "Hello."), ("Bye?", "See you."))


def test_turns_in_a_row_are_one_and_an_open_question_is_left_out() -> None:
    says = lambda role, text: {"role": role, "content": text}  # noqa: E731
    row = [says("user", "a"), says("user", "b"), says("assistant", "c"), says("assistant", "d"), says("user", "e")]
    assert read_conversation({"messages": row}, "messages", "row").exchanges == (("a\n\nb", "c\n\nd"),)
    alpaca = {"instruction": "Sum up.", "input": "A text.", "output": "Text."}
    assert read_conversation(alpaca, "alpaca", "row").exchanges == (("Sum up.\n\nA text.", "Text."),)


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("messages", {"message": []}, "row has no column 'messages'. It has: message"),
        ("messages", {"messages": "hello"}, "holds a str; it must be a list"),
        ("messages", {"messages": [{"from": "user"}]}, "row, turn 1 must hold `role` and `content`"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "turn 1 is by 'tool'. Allowed: system"),
        ("messages", {"messages": [{"role": "user", "content": ["x"]}]}, "holds a list; only text"),
        ("messages", {"messages": [{"role": "assistant", "content": "x"}]}, "nothing was asked before it"),
        ("messages", {"messages": [{"role": "user", "content": "x"}]}, "no answer of the assistant"),
        ("messages", {"messages": [*MESSAGES["messages"], {"role": "system", "content": "x"}]}, "turn 6 is a system"),
        ("alpaca", {"instruction": "x"}, "no column 'output'"),
        ("alpaca", {"instruction": "x", "output": "y", "history": ["z"]}, "`history` must be"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(form: str, row: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_conversation(row, form, "row")
    assert message in str(error.value)


def conversation(draw: random.Random, exchanges: int) -> Example:
    pairs = tuple((tiny.words(draw, 1, 6), tiny.words(draw, 1, 6)) for _ in range(exchanges))
    return Example("c", *pairs[-1], shots=pairs[:-1], learnt=exchanges - 1)


def encoders(request: pytest.FixtureRequest, name: str) -> Encoder:
    if name == "t5":
        return Encoder(tiny.unigram(), encoder_decoder=True, chat=False, max_length=400)
    if name == "smollm2":
        return Encoder(read_tokenizer(BaseSpec())[0], encoder_decoder=False, chat=True, max_length=2000)
    return Encoder(tiny.byte_bpe(), encoder_decoder=False, chat=name == "chat", max_length=2000)


@pytest.mark.parametrize("name", ["chat", "smollm2", "plain", "t5"])
def test_each_answer_is_trained_on_behind_its_prompt_at_inference(request: pytest.FixtureRequest, name: str) -> None:
    encoder, draw = encoders(request, name), random.Random(1)
    for number in range(60):
        example = conversation(draw, number % 4 + 1)
        rows = encoder.encode_all(example)
        assert len(rows) == (1 if name in ("chat", "smollm2") else number % 4 + 1)
        pairs = [*example.shots, (example.prompt, example.completion)]
        found = []
        for row in rows:
            ids = row.prompt + row.target
            for start, stop in [*row.earlier, (len(row.prompt), len(ids))]:
                found.append((ids[:start], ids[start:stop]))
        expected = [
            (
                encoder.prompt_ids(replace(example, prompt=question, shots=example.shots[:turn], learnt=0)),
                encoder.target_ids(answer),
            )
            for turn, (question, answer) in enumerate(pairs)
        ]
        assert found == expected
        assert [token for row in rows for token in row.labels] == [token for _, ids in expected for token in ids]


def test_the_loss_of_a_conversation_is_that_of_its_answers_one_by_one() -> None:
    base, draw = tiny.make("llama"), random.Random(2)
    encoder = Encoder(base.tokenizer, encoder_decoder=False, chat=True, max_length=500)
    examples = [conversation(draw, count) for count in (3, 1, 4, 2)]
    rows = encode_all(encoder, examples)
    assert len(rows) == 4
    apart = []
    for example in examples:
        pairs = [*example.shots, (example.prompt, example.completion)]
        for turn, (question, answer) in enumerate(pairs):
            one = replace(example, prompt=question, completion=answer, shots=example.shots[:turn], learnt=0)
            apart.append(encoder.encode(one))
    with torch.no_grad():
        together = loss_sum(base, collate(rows, None))
        alone = sum(loss_sum(base, collate([row], None)) for row in apart)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert len(collate(rows, None).labels) == sum(len(row.target) for row in apart)


def test_a_long_conversation_loses_its_oldest_exchanges_whole() -> None:
    encoder = Encoder(tiny.byte_bpe(), encoder_decoder=False, chat=True, max_length=2000)
    example = conversation(random.Random(3), 6)
    whole = encoder.encode(example)
    short = Encoder(tiny.byte_bpe(), encoder_decoder=False, chat=True, max_length=len(whole) - 1).encode_all(example)
    assert len(short) == 1
    fewer = replace(example, shots=example.shots[1:], learnt=4)
    assert short[0].prompt == encoder.encode(fewer).prompt
    assert len(short[0].earlier) == 4
    assert short[0].cut == len(whole.prompt) - len(short[0].prompt) > 0


def test_a_task_of_chat_logs(tmp_path: Path) -> None:
    rows = [MESSAGES] * 3 + [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Task(format="messages", train=Source("chat.jsonl"), validation=0, test=0)
    examples = load_examples(task, tmp_path, 0)
    assert examples.train[0] == Example(
        "chat.jsonl:1", "Bye?", "See you.", ("See you.",), system="Be kind.", shots=(("Hi?", "Hello."),), learnt=1
    )
    found = {one.kind: one.rows for one in audit_text(examples) if one.level == "error"}
    assert found == {"no target": ("chat.jsonl:4",)}
    with pytest.raises(ValueError, match="not both"):
        Task(format="messages", template="x ||| y")
    with pytest.raises(ValueError, match="needs a `template`"):
        Task()
