"""T5's block, which mT5's is too: attention with a bias by distance, in a decoder attention across, then an MLP.

Rows stand one after another in both stacks, and each is attended on its own (`PackedStack`); a block that cannot run as one
function runs through its modules, whose attentions are handed the same layout.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from luthier.models.activations import written_out_activation
from luthier.models.biased import PackedStack
from luthier.models.block import are_called, are_norms, products_of, quicken_blocks, run_block, scratch_of
from luthier.models.scratch import Scratch
from luthier.models.sublayers import MLP, Attention, Sublayer
from luthier.models.where import kind_of

_SAME = {"T5Block", "MT5Block"}


def quicken_t5(model: nn.Module, scratch: Scratch) -> None:
    """Let every such block of a model run as one function where it can."""
    quicken_blocks(model, _SAME, _forward, scratch)


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    sublayers = _sublayers(self, hidden_states, encoder_hidden_states, position_bias, kwargs.get("packing"))
    if sublayers is None:
        given = hidden_states, attention_mask, position_bias, encoder_hidden_states
        return type(self).forward(self, *given, *args, **kwargs)
    return run_block(self, sublayers, hidden_states), position_bias, position_bias


def _sublayers(
    block: Any, x: Tensor, encoded: Tensor | None, added: Tensor | None, packing: PackedStack | None
) -> Sequence[Sublayer] | None:
    """This pass through a block; None where a part of it has a gradient that is not written out."""
    if packing is None or added is None or kind_of(x) != "cpu" or x.dtype not in (torch.bfloat16, torch.float32):
        return None
    *attending, last = block.layer
    mlp = last.DenseReluDense
    if are_called(*block.layer, mlp) or not are_norms(*(one.layer_norm for one in block.layer)):
        return None
    gate, up = (mlp.wi_0, mlp.wi_1) if hasattr(mlp, "wi_0") else (mlp.wi, None)
    activation = written_out_activation(mlp.act)
    if activation is None:
        return None
    inner = products_of(gate, mlp.wo, *([] if up is None else [up]))
    if inner is None:
        return None
    scratch = scratch_of(block, x.shape[1])
    found: list[Sublayer] = []
    for layer in attending:
        across = not hasattr(layer, "SelfAttention")
        attention = layer.EncDecAttention if across else layer.SelfAttention
        if are_called(attention):
            return None
        mixing = products_of(attention.q, attention.k, attention.v, attention.o)
        if mixing is None:
            return None
        width = attention.key_value_proj_dim
        attended = packing.attended(across, added, attention.scaling, x, width)
        given = layer.layer_norm, mixing, scratch, attended, width
        found.append(Attention(*given, encoded=encoded[0]) if across else Attention(*given, bias=added))  # type: ignore[index]
    let_in, down, *let_through = inner
    return [*found, MLP(last.layer_norm, let_in, let_through[0] if let_through else None, down, activation, scratch)]
