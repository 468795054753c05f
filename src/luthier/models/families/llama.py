"""Llama's block, which Mistral's and Qwen2's are too: attention with rotary positions, then a gated MLP."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from luthier.models.activations import written_out_activation
from luthier.models.attention import attended_by
from luthier.models.block import are_called, are_norms, products_of, quicken_blocks, run_block, scratch_of
from luthier.models.packing import Packing
from luthier.models.scratch import Scratch
from luthier.models.sublayers import MLP, Attention, Sublayer

_SAME = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"}


def quicken_llama(model: nn.Module, scratch: Scratch) -> None:
    """Let every such block of a model run as one function where it can."""
    quicken_blocks(model, _SAME, _forward, scratch)


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    sublayers = _sublayers(self, hidden_states, kwargs.get("packing"), kwargs.get("position_embeddings"))
    if sublayers is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
    return run_block(self, sublayers, hidden_states)


def _sublayers(block: Any, x: Tensor, packing: Packing | None, positions: Any) -> Sequence[Sublayer] | None:
    """This pass through a block; None where a part of it has a gradient that is not written out."""
    attention, mlp = block.self_attn, block.mlp
    norms = block.input_layernorm, block.post_attention_layernorm
    if packing is None or packing.cache is not None or positions is None or x.shape[0] != 1:
        return None
    if are_called(attention, mlp) or not are_norms(*norms):
        return None
    activation = written_out_activation(mlp.act_fn)
    if activation is None:
        return None
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    attended = attended_by(packing, window, attention.scaling, x, attention.head_dim)
    if attended is None:
        return None
    mixing = products_of(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    inner = products_of(mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if mixing is None or inner is None:
        return None
    cos, sin = (one[0][:, None] for one in positions)  # (T, 1, d)
    scratch = scratch_of(block, x.shape[1])
    gate, up, down = inner
    return (
        Attention(norms[0], mixing, scratch, attended, attention.head_dim, rotary=(cos, sin)),
        MLP(norms[1], gate, up, down, activation, scratch),
    )
