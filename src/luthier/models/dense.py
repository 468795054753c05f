"""The weight of a linear or embedding as plain numbers, however the module stores it."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.models.quantize import QuantizedLinear


@torch.no_grad()
def dense_weight(module: nn.Module) -> Tensor:
    """A module's weight in fp32: (out, in) for a linear, also where GPT-2's Conv1D stores (in, out); else as stored.

    A 4-bit weight is unpacked to exactly the numbers that the layer multiplies with.
    """
    if isinstance(module, QuantizedLinear):
        return module.dequantized().float()
    weight: Tensor = module.weight.detach().float()  # type: ignore[union-attr, operator]
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


@torch.no_grad()
def product_weight(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """A linear's weight (out, in) in the precision of a product that is made at once: not copied, and of 4 bits gone at the next one."""
    if isinstance(module, QuantizedLinear):
        return module.unpacked().to(dtype)
    weight: Tensor = module.weight.detach().to(dtype)  # type: ignore[union-attr, operator]
    return weight.T if isinstance(module, Conv1D) else weight
