"""Exact targets over random text and five tokenizers: what is trained is the completion and one end token.

The rule: prompt and completion are tokenized apart, so no token straddles them. A byte-level BPE gives the
completion back to the byte; the others give it back in their own normalized form, the same as tokenizing the
completion alone would.
"""

import random
from functools import cache

import pytest
import torch
from tests import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from luthier.data.task import Example
from luthier.encoding.batches import collate
from luthier.encoding.encoder import Encoded, Encoder
from luthier.models.run import target_states

PAIRS = 1500
SIGNS = "abcdefghij  \n\t.,:;!?'\"|{}()<>/\\0123456789éßøñ東京語नमस्ते🙂👩‍💻\u00a0\u200b\u2028ﬁ"


@cache
def word_piece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        tiny.CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"])
    )
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]"
    )


@cache
def spaced_bpe() -> PreTrainedTokenizerFast:
    """A BPE with a start token and a marked space, as Llama 2's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(tiny.CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tokenizer_named(name: str, request: pytest.FixtureRequest):
    if name == "smollm2":
        from luthier.models.load import BaseSpec, read_tokenizer

        return read_tokenizer(BaseSpec())[0]
    if name == "t5":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("shared") / "data" / "t5-tokenizer")
    return {"word-piece": word_piece, "spaced-bpe": spaced_bpe, "byte-bpe": tiny.byte_bpe}[name]()


def asked_ids(tokenizer: PreTrainedTokenizerFast, example: Example, name: str) -> list[int]:
    """A prompt's ids by the tokenizer alone: a chat's turn, an encoder's text, or a text and a line's end."""
    if name == "smollm2":
        turns = [{"role": "user", "content": example.prompt}]
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
    if name == "t5":
        return list(tokenizer(example.prompt).input_ids)
    ids = list(tokenizer(f"{example.prompt}\n").input_ids)
    return ids[:-1] if name == "word-piece" else ids  # its end token would stand between prompt and completion


PLAIN = "abcdefghij  .,:;!?"


def text(draw: random.Random, most: int) -> str:
    signs = draw.choice((SIGNS, PLAIN))
    return "".join(draw.choice(signs) for _ in range(draw.randint(1, most)))


@pytest.mark.parametrize("name", ["smollm2", "t5", "word-piece", "spaced-bpe", "byte-bpe"])
def test_trained_ids_are_the_completion_and_one_end_token(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = tokenizer_named(name, request)
    encoder = Encoder(tokenizer, encoder_decoder=name == "t5", chat=name == "smollm2", max_length=4096)
    exact = name in ("smollm2", "byte-bpe")
    draw, rows, known, unlike = random.Random(0), [], 0, 0
    start = tokenizer.bos_token_id
    for number in range(PAIRS):
        example = Example(str(number), text(draw, 40), text(draw, 25))
        row = encoder.encode(example)
        rows.append(row)
        *body, last = row.target
        assert last == encoder.end
        alone = tokenizer(example.completion, add_special_tokens=False).input_ids
        assert body == alone, "the completion's ids must not depend on the prompt"
        said = tokenizer.decode(body, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if exact:
            assert said == example.completion
        again = tokenizer(said, add_special_tokens=False).input_ids
        if tokenizer.unk_token_id not in body or exact:  # an unknown sign is lost, whoever tokenizes it
            known += 1
            unlike += again != body  # a normalizer need not be idempotent on every sign; it is on nearly all
        assert row.prompt == asked_ids(tokenizer, example, name), "prompt ids must be those used at inference"
        if start is not None and not encoder.chat and name != "t5":
            assert row.prompt.count(start) == (1 if name != "byte-bpe" else 0)
    assert known > PAIRS // 20
    assert unlike <= known // 20
    batch = collate(rows[:200], 0 if name == "t5" else None)
    packed = batch.labels.split([len(row.target) for row in rows[:200]])
    for row, labels in zip(rows, packed, strict=False):
        single = collate([row], 0 if name == "t5" else None)
        assert labels.tolist() == single.labels.tolist() == row.target
    if name != "t5":
        assert_targets_come_before_their_labels(batch.source.ids, batch.targets, batch.labels, rows[:200])


def assert_targets_come_before_their_labels(ids: Tensor, targets: Tensor, labels: Tensor, rows: list[Encoded]) -> None:
    """The token after each target is its label; a row's last label, the end token, is never read."""
    ends = set(torch.tensor([len(row.target) for row in rows]).cumsum(0).sub(1).tolist())
    inner = [place for place in range(len(labels)) if place not in ends]
    assert torch.equal(ids[targets[inner] + 1], labels[inner])
    lasts = torch.tensor([len(row.prompt) + len(row.target) - 1 for row in rows]).cumsum(0) - 1
    assert torch.equal(targets[sorted(ends)], lasts)


def test_padded_rows_give_the_states_before_their_labels() -> None:
    """A base that does not pack, with states that say which token they were made of."""
    encoder = Encoder(tiny.byte_bpe(), encoder_decoder=False, chat=False, max_length=64)
    draw = random.Random(2)
    rows = [encoder.encode(Example(str(number), text(draw, 30), text(draw, 15))) for number in range(8)]
    batch = collate(rows, None)
    base = tiny.make("opt")
    with torch.no_grad():
        together = target_states(base, batch)
        alone = []
        for row in rows:
            ids = torch.tensor([row.prompt + row.target[:-1]])
            states = base.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
            alone.append(states[len(row.prompt) - 1 :])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert_targets_come_before_their_labels(batch.source.ids, batch.targets, batch.labels, rows)


def test_plain_and_chat_train_the_same_ids(request: pytest.FixtureRequest) -> None:
    tokenizer, draw = tokenizer_named("smollm2", request), random.Random(1)
    chat = Encoder(tokenizer, encoder_decoder=False, chat=True, max_length=4096)
    plain = Encoder(tokenizer, encoder_decoder=False, chat=False, max_length=4096)
    for number in range(200):
        example = Example(str(number), text(draw, 40), text(draw, 25))
        assert chat.encode(example).target == plain.encode(example).target
