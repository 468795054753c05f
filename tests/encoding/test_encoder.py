"""What is trained on: the completion and one end token, and prompt ids equal to those at inference."""

import random
from collections.abc import Iterable

import pytest
from tests import tiny

from luthier.data.task import Example
from luthier.encoding.batches import collate, micro_batches
from luthier.encoding.encoder import Encoded, Encoder, cut_middle
from luthier.encoding.order import Shuffled, step_rows
from luthier.errors import UserError
from luthier.training.settings import TrainingSettings

KINDS = {
    "chat": lambda: Encoder(tiny.byte_bpe(), encoder_decoder=False, chat=True, max_length=200),
    "plain": lambda: Encoder(tiny.byte_bpe(), encoder_decoder=False, chat=False, max_length=200),
    "t5": lambda: Encoder(tiny.unigram(), encoder_decoder=True, chat=False, max_length=200),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_trained_ids_are_the_completion_and_one_end_token(kind: str) -> None:
    encoder, draw = KINDS[kind](), random.Random(0)
    alphabet = "abc xyz.,!?\n\té東😀"
    for number in range(300):
        completion = "".join(draw.choice(alphabet) for _ in range(draw.randint(1, 12))).strip() or "x"
        example = Example(str(number), tiny.words(draw, 1, 6), completion)
        row = encoder.encode(example)
        assert row.target[-1] == encoder.end
        assert encoder.end not in row.target[:-1]
        assert row.prompt == encoder.prompt_ids(example), "prompt ids differ from those at inference"
        if kind != "t5":  # byte-level: exact; a unigram gives the text its normalizer leaves
            assert encoder.tokenizer.decode(row.target[:-1]) == completion


def test_a_chat_prompt_is_the_template_and_begins_once() -> None:
    encoder = KINDS["chat"]()
    example = Example("1", "How?", "So.", system="Be brief.", shots=(("a?", "b."),))
    assert encoder.prompt_text(example) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nb.<|im_end|>\n"
        "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = encoder.prompt_ids(example)
    assert encoder.tokenizer.decode(ids) == encoder.prompt_text(example)
    assert ids.count(encoder.tokenizer.bos_token_id) == 5, "one start token a turn, none doubled"


def test_t5_prompts_end_once() -> None:
    encoder = KINDS["t5"]()
    ids = encoder.prompt_ids(Example("1", "hello room", "x"))
    assert ids.count(encoder.tokenizer.eos_token_id) == 1
    assert ids[-1] == encoder.tokenizer.eos_token_id


@each_kind
def test_long_prompts_lose_their_middle_and_targets_nothing(kind: str) -> None:
    encoder = KINDS[kind]()
    example = Example("1", "first " + "very " * 300 + "last", "yes no maybe")
    uncut, row = encoder.prompt_ids(example), encoder.encode(example, reserve=10)
    assert row.cut == len(uncut) - len(row.prompt) > 0
    assert row.target == encoder.target_ids("yes no maybe")
    assert len(row.prompt) + (0 if kind == "t5" else len(row.target)) == 190
    assert row.prompt[:40] == uncut[:40]
    assert row.prompt[-40:] == uncut[-40:]
    assert cut_middle([1, 2, 3, 4, 5], 3) == [1, 2, 5]
    with pytest.raises(UserError, match="row 9: the completion has .* no room is left"):
        encoder.encode(Example("row 9", "a b c d e f g h i", "yes " * 400))


@each_kind
def test_masks_cover_completion_and_end_in_any_batch(kind: str) -> None:
    """Labels and the states that predict them, against a slow reading of the same rows."""
    encoder, draw = KINDS[kind](), random.Random(1)
    rows = [encoder.encode(Example(str(n), tiny.words(draw, 1, 9), tiny.words(draw, 1, 4))) for n in range(7)]
    batch = collate(rows, 0 if kind == "t5" else None)
    assert batch.labels.tolist() == [token for row in rows for token in row.target]
    assert batch.owners.tolist() == [n for n, row in enumerate(rows) for _ in row.target]
    if kind == "t5":
        assert batch.decoder is not None
        assert batch.decoder.ids.tolist() == [token for row in rows for token in (0, *row.target[:-1])]
        assert batch.source.ids.tolist() == [token for row in rows for token in row.prompt]
        return
    flat = batch.source.ids.tolist()
    before = [flat[index] for index in batch.targets.tolist()]
    expected = [token for row in rows for token in (row.prompt[-1], *row.target[:-1])]
    assert before == expected


def test_order_is_a_permutation_an_epoch_and_a_function_of_seed_and_k() -> None:
    def places(seed: int, ks: Iterable[int]) -> list[int]:
        stream = Shuffled([Encoded("", [], [])] * 13, seed)
        return [stream.place(k) for k in ks]

    first = places(5, range(39))
    assert [sorted(first[start : start + 13]) for start in (0, 13, 26)] == [list(range(13))] * 3
    assert first[:13] != first[13:26]
    backwards = places(5, reversed(range(39)))
    assert backwards[::-1] == first
    assert places(6, range(39)) != first


def test_steps_cover_an_epoch_and_micro_batches_keep_to_their_budget() -> None:
    rows = [Encoded(str(n), [1] * (n % 7 + 1), [2, 3]) for n in range(30)]
    seen = [row.id for step in range(4) for row in step_rows(Shuffled(rows, 0), 8, step)]
    assert sorted(seen) == sorted(row.id for row in rows)
    for padded in (True, False):
        groups = micro_batches(rows, 20, padded)
        assert sorted(row.id for group in groups for row in group) == sorted(row.id for row in rows)
        for group in groups:
            cost = max(map(len, group)) * len(group) if padded else sum(map(len, group))
            assert cost <= 20
    assert len(micro_batches(rows, 1, False)) == 30


@pytest.mark.parametrize("padded", [False, True])
def test_micro_batches_are_as_few_as_the_budget_allows_and_about_equal(padded: bool) -> None:
    draw = random.Random(0)
    for _ in range(50):
        rows = [
            Encoded(str(i), [1] * draw.randint(1, 60), [2] * draw.randint(1, 9)) for i in range(draw.randint(1, 12))
        ]
        budget = draw.randint(30, 200)

        def cost(group: list[Encoded], padded: bool = padded) -> int:
            return len(group) * len(group[0]) if padded else sum(map(len, group))

        def first_fit(budget: int, rows: list[Encoded] = rows) -> list[list[Encoded]]:
            groups: list[list[Encoded]] = []
            for row in sorted(rows, key=len, reverse=True):
                if groups and cost([*groups[-1], row]) <= budget:
                    groups[-1].append(row)
                else:
                    groups.append([row])
            return groups

        found = micro_batches(rows, budget, padded)
        assert sorted(row.id for group in found for row in group) == sorted(row.id for row in rows)
        assert all(cost(group) <= budget or len(group) == 1 for group in found)
        fewest = len(first_fit(budget))
        assert len(found) == fewest
        most = max(map(cost, found))
        assert all(len(first_fit(less)) > fewest for less in range(1, most) if most > max(map(len, rows)))


def test_small_models_take_more_tokens_at_once_on_a_cpu() -> None:
    default, own = TrainingSettings(), TrainingSettings(micro_batch_tokens=77)
    assert (
        default.token_budget("cpu")
        == default.token_budget("cpu", 30 * 576)
        == default.token_budget("cpu", 10**6)
        == 2048
    )
    assert default.token_budget("cpu", 8 * 1024) == default.token_budget("cpu", 64) == 4096
    assert default.token_budget("cuda", 64) == 8192
    assert own.token_budget("cpu", 64) == own.token_budget("cuda", 64) == 77
