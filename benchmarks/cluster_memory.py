"""Memory that each GPU needs where `training.shard` divides a model over N: arithmetic on meta tensors, nothing is measured.

    states   = (weights + gradients + fp32 masters + Adam's two moments) / N; alone, full tuning keeps the base's weights too
    gathered = weights outside the blocks, and of 3 blocks: one that runs, one kept until the next has come, one on its way;
               of what is trained there gradients too, and in fp32 twice while a block's are added up; nothing for N = 1
    inside   = blocks x tokens x D (each block's input, with gradient_checkpointing)
               + 2 x tokens x (6 D + 2 D_kv + 4 F) (one block computed again, and its gradients) + the head's chunk

Parameters are counted on the models themselves, as Luthier attaches the tuning. Attention is taken to be a fused kernel.
What CUDA, NCCL and the allocator keep for themselves is not counted: leave a tenth free.

    python benchmarks/cluster_memory.py [--tokens 4096] [--rank 8]
"""

import argparse
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.nn import Parameter
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier.models.base import BaseModel
from luthier.models.loss import CHUNK
from luthier.tuning import Full, LoRA, Method, attach, parameters

GIB = 2**30
GPUS = (1, 2, 8, 16, 64)
# The shapes of Llama 2 (Touvron et al. 2023, https://arxiv.org/abs/2307.09288).
MODELS = {
    "7B": LlamaConfig(),
    "70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    ),
}


def tuned(config: LlamaConfig, dtype: torch.dtype, method: Method) -> BaseModel:
    """The model without numbers, the tuning attached and in use."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    base = BaseModel(model, None)
    attach(base, "t", method)
    base.use("t")
    return base


def state_bytes(base: BaseModel) -> int:
    """Bytes of everything that is divided: the weights in use, and for the trained ones gradients, masters, moments."""
    every = {id(one): one for one in base.model.parameters()}
    held = sum(one.numel() * one.element_size() for one in every.values())
    for one in parameters(base, "t").values():
        master = 0 if one.dtype == torch.float32 else 4
        held += one.numel() * (one.element_size() + master + 8)
    return held


def original_bytes(base: BaseModel) -> int:
    """Bytes of the base's weights that the tuning replaces: one process alone keeps them."""
    used = {id(one) for one in base.model.parameters()}
    return sum(one.numel() * one.element_size() for one in base.grafts.originals.values() if id(one) not in used)


def gathered_bytes(base: BaseModel) -> int:
    """Bytes that are whole for a while beside the divided ones."""
    blocks = [one for one in base.model.modules() if isinstance(one, GradientCheckpointingLayer)]
    within = {id(one) for block in blocks for one in block.parameters()}
    outside = [one for one in base.model.parameters() if id(one) not in within]
    block, rest = _weights_and_gradients(blocks[0].parameters()), _weights_and_gradients(outside)
    adding = max(block.gradients + 2 * 4 * block.trained, 4 * rest.trained)
    return rest.weights + 3 * block.weights + rest.gradients + adding


class Size(NamedTuple):
    """Bytes of weights and of gradients, numbers trained."""

    weights: int
    gradients: int
    trained: int


def _weights_and_gradients(several: Iterable[Parameter]) -> Size:
    held = list(several)
    trained = [one for one in held if one.requires_grad]
    size = [sum(one.numel() * one.element_size() for one in some) for some in (held, trained)]
    return Size(*size, sum(one.numel() for one in trained))


def inside_bytes(config: LlamaConfig, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of activations for one micro-batch of so many tokens."""
    width, keys = config.hidden_size, config.hidden_size * config.num_key_value_heads // config.num_attention_heads
    kept = config.num_hidden_layers * tokens * width
    again = 2 * tokens * (6 * width + 2 * keys + 4 * config.intermediate_size)
    return (kept + again) * dtype.itemsize + 3 * CHUNK * config.vocab_size * 4


def main() -> None:
    """Print the table of docs/cluster.md."""
    options = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    options.add_argument("--tokens", type=int, default=4096, help="micro_batch_tokens of each GPU")
    options.add_argument("--rank", type=int, default=8, help="LoRA's rank, on all linears")
    asked = options.parse_args()
    print(
        "| model | tuning | weights | trained | bytes of state | "
        + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in GPUS)
        + " |"
    )
    print("|---|---|---|---:|---:|" + "---:|" * len(GPUS))
    for name, config in MODELS.items():
        for what, method in (("full", Full()), (f"LoRA r={asked.rank}", LoRA(rank=asked.rank))):
            for dtype in (torch.bfloat16, torch.float32):
                base = tuned(config, dtype, method)
                trained = sum(one.numel() for one in parameters(base, "t").values())
                states, once = state_bytes(base), inside_bytes(config, dtype, asked.tokens)
                apart = [states / n + (gathered_bytes(base) if n > 1 else original_bytes(base)) for n in GPUS]
                kept = "bf16, fp32 masters" if dtype == torch.bfloat16 and what == "full" else str(dtype)[6:]
                print(
                    f"| {name} | {what} | {kept} | {trained / 1e6:,.1f} M | {states / GIB:,.1f} GiB | "
                    + " | ".join(f"{(one + once) / GIB:,.1f}" for one in apart) + " |"
                )  # fmt: skip


if __name__ == "__main__":
    main()
