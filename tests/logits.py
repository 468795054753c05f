"""All logits of a base on two rows, through its own batches."""

import torch

from luthier.models.base import BaseModel
from luthier.models.batch import Batch, Packed
from luthier.models.run import target_states


@torch.no_grad()
def all_logits(base: BaseModel, inputs: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Logits of two rows at every position, cut to their mask and run as one batch: (real tokens, vocabulary)."""
    ids, kept = inputs["input_ids"], mask.bool()
    source = Packed(ids[kept], tuple(kept.sum(1).tolist()))
    if base.encoder_decoder:
        decoder = inputs["decoder_input_ids"]
        length = decoder.shape[1]
        count = decoder.numel()
        packed = Packed(decoder.flatten(), (length,) * len(decoder))
        owners = torch.arange(len(decoder)).repeat_interleave(length)
        batch = Batch(("a", "b"), source, torch.arange(count), decoder.flatten(), owners, packed, (0, 1))
    else:
        count = len(source.ids)
        owners = torch.arange(2).repeat_interleave(torch.tensor(source.lengths))
        batch = Batch(("a", "b"), source, torch.arange(count), source.ids, owners)
    return base.logits(target_states(base, batch))
