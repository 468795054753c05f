"""Which methods with which settings the laws are tested on: every trained method of METHODS, on every family."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tests import tiny

from luthier.models.base import BaseModel
from luthier.models.parts import attention_heads, layout, matching, norms
from luthier.tuning import IA3, METHODS, Bottleneck, Full, LoRA, Method, PrefixTuning, PromptTuning, Selective
from luthier.tuning.low_rank import features
from luthier.tuning.targets import LINEAR, match_modules

FAMILIES = tiny.DECODERS + tiny.UNPACKED + tiny.ENCODER_DECODERS
TIED = ("llama", "gpt2", "gemma2", "t5")

# One setting of every method: all families, fp32 and bf16.
METHOD_CASES: dict[str, Method] = {
    "full": Full(),
    "selective": Selective(),
    "lora": LoRA(rank=2, alpha=4),
    "bottleneck": Bottleneck(reduction=8),
    "prompt_tuning": PromptTuning(length=3, init="vocabulary"),
    "prefix_tuning": PrefixTuning(length=3, init="vocabulary"),
    "ia3": IA3(),
}
# Other settings, on families where they differ.
VARIANTS: dict[str, tuple[Method, tuple[str, ...]]] = {
    "selective-last-block": (Selective(targets="last-1-block"), ("llama", "gpt2", "t5")),
    "selective-bias": (Selective(targets="bias"), ("gpt2", "qwen2", "opt")),
    "selective-embeddings": (Selective(targets="embeddings", untie=True), ("llama", "gemma2", "opt", "t5", "t5-gated")),
    "selective-head": (Selective(targets="head", untie=True), ("llama", "qwen2", "t5", "t5-gated")),
    "selective-pattern": (Selective(targets=["*.0.*", "head", "embeddings"]), ("llama", "gpt2", "t5")),
    "lora-dora": (LoRA(rank=2, dora=True), ("llama", "gpt2", "gemma2", "opt", "t5-gated")),
    "lora-embeddings": (LoRA(rank=2, targets=["embeddings", "attention"]), ("llama", "gemma2", "opt", "t5")),
    "lora-dora-embeddings": (LoRA(rank=2, targets="embeddings", dora=True), ("llama", "gemma2", "t5-gated")),
    "lora-patterns": (
        LoRA(rank=2, targets="*.1.*", rslora=True, rank_pattern={r"\w+\.\w+": 3}, alpha_pattern={r".*\.1\..*": 5.0}),
        ("llama", "gpt2", "t5"),
    ),
    "lora-last-block": (LoRA(rank=2, targets="attention", layers=[-1]), ("llama", "opt", "t5")),
    "lora-first-block": (LoRA(rank=2, targets="*.0.*"), ("gpt2", "t5", "t5-gated")),
    "lora-head": (LoRA(rank=2, targets="lm_head"), ("llama", "gemma2", "t5")),
    "lora-modules-to-save": (LoRA(rank=2, modules_to_save=["lm_head"], untie=True), ("llama", "qwen2", "t5")),
    "bottleneck-houlsby": (Bottleneck("bottleneck", "houlsby", 8, "gelu"), ("llama", "gpt2", "gemma2", "opt", "t5")),
    "bottleneck-parallel": (Bottleneck("bottleneck", "parallel", 8, "silu"), ("llama", "gpt2", "t5-gated")),
    "prompt-labels": (
        PromptTuning(length=4, init="class_labels", labels=["yes", "red blue"]),
        ("gemma2", "t5"),
    ),
    "prefix-network": (PrefixTuning(length=3, reparametrise=True, hidden=6), ("llama", "gemma2", "opt", "t5")),
    "prefix-random": (PrefixTuning(length=9, init="random"), ("mistral", "qwen2", "t5-gated")),
    "ia3-inner": (IA3(targets=[]), ("llama", "gpt2", "t5")),
}


@dataclass(frozen=True)
class Case:
    family: str
    method: Method
    dtype: torch.dtype = torch.float32


def _cases(dtypes: tuple[torch.dtype, ...], keep: Callable[[Method], bool] = lambda method: True):
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    found = [
        pytest.param(Case(family, method, dtype), id=f"{name}-{family}-{short[dtype]}")
        for dtype in dtypes
        for name, method in METHOD_CASES.items()
        for family in FAMILIES
        if keep(method)
    ]
    found += [
        pytest.param(Case(family, method, dtype), id=f"{name}-{family}-{short[dtype]}")
        for dtype in dtypes
        for name, (method, families) in VARIANTS.items()
        for family in families
        if keep(method)
    ]
    return pytest.mark.parametrize("case", found)


def count(base: BaseModel, method: Method) -> int:
    """The formula of each method's parameters, from the shapes of a bare base."""
    size = lambda one: sum(parameter.numel() for parameter in one.parameters())  # noqa: E731
    match method:
        case Full():
            return size(base.model)
        case Selective(targets="layernorm"):
            return sum(size(module) for module in norms(base).values())
        case LoRA(rank=rank, dora=dora):  # r (in + out), and out for DoRA's magnitudes
            chosen = match_modules(base, method.targets, (*LINEAR, torch.nn.Embedding), method.layers)
            sizes = [
                (one.num_embeddings, one.embedding_dim) if isinstance(one, torch.nn.Embedding) else features(one)
                for one in chosen.values()
            ]
            return sum(rank * (inputs + outputs) + dora * outputs for inputs, outputs in sizes)
        case Bottleneck():  # 2 m D + m + D
            inner, where = base.width // method.reduction, layout(base)
            patterns = {"houlsby": [where.attention_output, where.mlp_output], "pfeiffer": [where.mlp_output]}
            places = sum(len(matching(base, one)) for one in patterns.get(method.placement, [where.mlp]))
            return places * (2 * inner * base.width + inner + base.width)
        case PromptTuning():  # P D
            return method.length * base.width
        case PrefixTuning(length=length, hidden=hidden):  # P n, n = layers x 2 K d; an encoder-decoder's layers share
            layers, heads, width = attention_heads(base)
            pairs = len({2 * layer % layers for layer in range(layers)}) if base.encoder_decoder else layers
            size_of = pairs * 2 * heads * width
            network = length * base.width + (base.width + 1) * hidden + (hidden + 1) * size_of  # e, W_1, b_1, W_2, b_2
            return network if method.reparametrise else length * size_of
        case IA3(targets="auto"):  # out of keys and values, in of the MLP's last linear
            where = layout(base)
            outer = [module for one in where.keys_values for module in matching(base, one).values()]
            return sum(features(one)[1] for one in outer) + sum(
                features(one)[0] for one in matching(base, where.mlp_output).values()
            )
    raise AssertionError(f"{method} has no formula here")


def has_formula(method: Method) -> bool:
    """Whether `count` knows a setting: those that only choose other modules are counted by their method's own."""
    if isinstance(method, LoRA):
        return not method.rank_pattern and not method.modules_to_save
    return method in METHOD_CASES.values() or isinstance(method, (Bottleneck, PromptTuning, PrefixTuning))


DTYPES = (torch.float32, torch.bfloat16)
each_case_and_dtype = _cases(DTYPES)
each_case_with_formula = _cases(DTYPES[:1], has_formula)
each_case_that_merges = _cases(DTYPES, lambda method: method.laws.merge.holds)

assert {method.method for method in METHOD_CASES.values()} == {
    name for name, kind in METHODS.items() if hasattr(kind, "laws")
}, "every trained method has its laws tested"
