"""Tiny models of every family, with tokenizers trained here: nothing is downloaded."""

import os
import random
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from luthier.models.base import BaseModel
from luthier.models.load import BaseSpec
from luthier.models.quantize import Quantization

CORPUS = [
    "The guest asks the clerk for a quiet room and pays for two nights.",
    "Summarise: Anna says hello. Ben answers and asks about the parcel!",
    "yes no maybe red blue green one two three four five six seven eight nine ten",
    "Question: where is the cat? Answer: on the mat. Étude, naïve, 東京, 😀 \t tabs\nlines",
]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# LUTHIER_TEST_DEVICE=cuda runs the laws on a GPU.
DEVICE = torch.device(os.environ.get("LUTHIER_TEST_DEVICE", "cpu"))

DECODERS = ("llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma2")
ENCODER_DECODERS = ("t5", "t5-gated")
# Encoder-decoders with learned or sinusoidal positions, embeddings that are scaled and a bias on the logits.
ABSOLUTE = ("bart", "pegasus")
UNPACKED = ("opt",)


@cache
def byte_bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE with chat turns, as SmolLM2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT
    return fast


@cache
def unigram() -> PreTrainedTokenizerFast:
    """A unigram tokenizer that ends every text with </s>, as T5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=list("abcdefghijk"),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", padding_side="right"
    )


def make(
    family: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    blocks: int = 2,
    quantize: Quantization | None = None,
) -> BaseModel:
    """A tiny random base of a family, with `quantize` its linears in 4 bits."""
    torch.manual_seed(seed)
    tokenizer = unigram() if family in (*ENCODER_DECODERS, *ABSOLUTE) else byte_bpe()
    size = len(tokenizer)
    shared = {
        "vocab_size": size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    t5 = {
        "vocab_size": size,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": blocks,
        "num_decoder_layers": blocks,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shared, tie_word_embeddings=True))
    elif family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size, n_embd=32, n_layer=blocks, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2
            )
        )
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shared))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shared, head_dim=8))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**shared, sliding_window=8))
    elif family == "gemma2":
        model = Gemma2ForCausalLM(
            Gemma2Config(
                **shared,
                head_dim=8,
                query_pre_attn_scalar=8,
                sliding_window=8,
                final_logit_softcapping=5.0,
                attn_logit_softcapping=4.0,
            )
        )
    elif family == "opt":
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=size,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=blocks,
                num_attention_heads=4,
                word_embed_proj_dim=32,
                max_position_embeddings=512,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                dropout=0.1,
            )
        )
    elif family == "t5":
        model = T5ForConditionalGeneration(T5Config(**t5, feed_forward_proj="relu", tie_word_embeddings=True))
    elif family == "t5-gated":
        model = T5ForConditionalGeneration(T5Config(**t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    elif family in ABSOLUTE:
        configuration, kind = {
            "bart": (BartConfig, BartForConditionalGeneration),
            "pegasus": (PegasusConfig, PegasusForConditionalGeneration),
        }[family]
        model = kind(configuration(
            vocab_size=size, d_model=32, encoder_layers=blocks, decoder_layers=blocks, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=512, pad_token_id=0,
            bos_token_id=1, eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=None, scale_embedding=True,
        ))  # fmt: skip
        model.final_logits_bias.normal_(std=0.1)
    else:
        raise AssertionError(family)
    with torch.no_grad():  # norms away from 1 and biases away from 0, so that nothing cancels by chance
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif family not in ENCODER_DECODERS:
                parameter.mul_(4.0)
    spec = BaseSpec(model="in-memory", quantize=quantize)
    return BaseModel(model.to(dtype), tokenizer, spec, None if DEVICE.type == "cpu" else DEVICE)


def words(generator: random.Random, least: int, most: int) -> str:
    """A random text from the corpus's words."""
    vocabulary = " ".join(CORPUS).split()
    return " ".join(generator.choice(vocabulary) for _ in range(generator.randint(least, most)))
