"""Gradient checkpointing (Chen et al. 2016, https://arxiv.org/abs/1604.06174): keep a block's input, compute its inside again.

memory of activations: blocks x (input) + one block's inside; time: one more forward pass. Of a share of the blocks: these blocks' inputs, the others' insides
and one more; that share of the time.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier.errors import UserError


@contextmanager
def recomputed(model: nn.Module, share: float = 1.0) -> Iterator[None]:
    """Within it, this share of the model's blocks, from the first on, is computed again in the backward pass instead of kept; of 0, none.

    Raises UserError for a model whose blocks transformers cannot checkpoint.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if share and not blocks:
        raise UserError(
            f"gradient_checkpointing: the blocks of {type(model).__name__} cannot be checkpointed. Set it to false."
        )
    blocks = blocks[: math.ceil(share * len(blocks))]
    # The same random numbers in both passes: dropout inside a tuning must not differ.
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=True)
    # Some blocks drop out by themselves while they train (F.dropout(x, self.dropout, self.training)).
    drops = [
        (block, key, value)
        for block in blocks
        for key, value in vars(block).items()
        if "drop" in key and type(value) is float
    ]
    for block, key, _ in drops:
        setattr(block, key, 0.0)
    for block in blocks:
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = again  # type: ignore[assignment]
        block.training = True  # of the block alone: what is inside stays in eval mode
    try:
        yield
    finally:
        for block in blocks:
            block.gradient_checkpointing = False
            block.training = False
        for block, key, value in drops:
            setattr(block, key, value)
