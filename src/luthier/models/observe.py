"""What the bare base computes on a text: the keys and values that its attention holds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.models.base import BaseModel
from luthier.models.batch import Packed
from luthier.models.packing import Packing, RowCache
from luthier.models.parts import attention_heads
from luthier.models.run import encode, run_packed


@torch.no_grad()
def keys_and_values(base: BaseModel, ids: Sequence[int]) -> Tensor:
    """(layers, 2, K, T, d): the decoder's keys and values, fp32, after reading `ids` at positions 0 ... T - 1.

    An encoder-decoder reads them on both sides.
    """
    layers, heads, width = attention_heads(base)
    if base.device.type == "meta":  # a skeleton computes nothing
        return torch.empty(layers, 2, heads, len(ids), width, device="meta")
    tokens = torch.tensor(ids, device=base.device)
    with base.grafts.bare():
        if base.packs:
            cache = RowCache(layers, (len(ids),), 0)
            positions = torch.arange(len(ids), device=base.device)[None]
            run_packed(base, base.embedding(tokens)[None], positions, Packing((len(ids),), cache=cache))
            held = [cache.own(layer, len(ids)) for layer in range(layers)]
        else:
            options = {}
            if base.encoder_decoder:
                encoded, mask = encode(base, Packed(tokens, (len(ids),)), ())
                options = {"encoder_hidden_states": encoded, "encoder_attention_mask": mask}
            out = base.model.get_decoder()(input_ids=tokens[None], use_cache=True, **options).past_key_values
            held = [(layer.keys, layer.values) for layer in getattr(out, "self_attention_cache", out).layers]
    return torch.stack([torch.stack([keys[0], values[0]]) for keys, values in held]).float()
