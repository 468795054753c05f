"""Reading through a memo of words gives the ids that reading the whole text gives."""

import json
import random

import pytest
from tests import tiny
from tests.encoding.test_exact_targets import spaced_bpe, text, tokenizer_named, word_piece
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from luthier.encoding import words
from luthier.encoding.words import SPLITS, WordMemo, cuts_at_spaces, reader


def split_bpe(pattern: str) -> PreTrainedTokenizerFast:
    """As Llama 3's and Qwen 2's: a split by a pattern, then bytes; with NFC, as Qwen 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    tokenizer.train_from_iterator(tiny.CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def content(tokenizer: PreTrainedTokenizerFast) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


@pytest.mark.parametrize("kind", ["smollm2", "byte-bpe", *sorted(SPLITS)])
def test_a_memo_changes_no_id(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = split_bpe(kind) if kind in SPLITS else tokenizer_named(kind, request)
    read = reader(tokenizer)
    assert isinstance(read, WordMemo)
    draw = random.Random(1)
    special = tokenizer.all_special_tokens
    for _ in range(3000):
        given = text(draw, 60)
        if draw.random() < 0.2:
            given = given[: len(given) // 2] + draw.choice(special) + given[len(given) // 2 :]
        assert read(given) == tokenizer.backend_tokenizer.encode(given, add_special_tokens=False).ids, repr(given)


def test_a_full_memo_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "KEPT", 3)
    tokenizer = tiny.byte_bpe()
    read = WordMemo(tokenizer.backend_tokenizer)
    given = "one two three four five six one two"
    assert read(given) == tokenizer(given, add_special_tokens=False).input_ids
    assert len(read._words) <= 3


def test_a_text_without_spaces_is_not_kept() -> None:
    tokenizer = tiny.byte_bpe()
    read = WordMemo(tokenizer.backend_tokenizer)
    whole = "東京" * 30
    for given in (whole, f"a {whole} b", f"a b {whole}"):
        assert read(given) == tokenizer(given, add_special_tokens=False).input_ids
    assert max(map(len, [*read._words, *read._pieces])) <= 40


def test_a_tokenizer_whose_tokens_may_span_words_is_read_whole(request: pytest.FixtureRequest) -> None:
    for tokenizer in (spaced_bpe(), word_piece()):
        assert not cuts_at_spaces(content(tokenizer))
        assert not isinstance(reader(tokenizer), WordMemo)
    sound = content(tiny.byte_bpe())
    assert cuts_at_spaces(sound)
    prefixed = content(tiny.byte_bpe())
    last = prefixed["pre_tokenizer"].get("pretokenizers", [prefixed["pre_tokenizer"]])[-1]
    last["add_prefix_space"] = True
    unknown = content(split_bpe(next(iter(SPLITS))))
    unknown["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+ \w+"
    assert cuts_at_spaces(content(split_bpe(next(iter(SPLITS)))))
    greedy = split_bpe(next(iter(SPLITS)))
    greedy.add_tokens([AddedToken("<call>", rstrip=True)])
    two_words = split_bpe(next(iter(SPLITS)))
    two_words.add_tokens([AddedToken("New York")])
    for other in (prefixed, unknown, content(greedy), content(two_words), {**sound, "normalizer": {"type": "NFKC"}}):
        assert not cuts_at_spaces(other)
