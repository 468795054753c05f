"""A dry run: a skeleton's code runs as on a device, on tensors that have shapes and precisions but no numbers.

What a `Ledger` sees of it (bytes, operations) is what it would see of the real run; nothing is read, and no memory is taken.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from luthier.models.attention import stands_for
from luthier.models.base import BaseModel
from luthier.models.quantize import QuantizedLinear

aten = torch.ops.aten


@contextmanager
def dry_run(base: BaseModel, device: torch.device) -> Iterator[None]:
    """Within it a skeleton takes the paths that a base on `device` takes; its 4-bit linears are packed from here on."""
    packed = [one for one in base.grafts.modules.values() if isinstance(one, QuantizedLinear) and one.packed is None]
    if packed:
        QuantizedLinear(torch.zeros(1, 64), None, torch.device("cpu"), double=True)  # fills bitsandbytes' tables
    for module in packed:
        module.pack(torch.empty_like(module.weight), base.spec.double_quantize)
    token = stands_for.set(device.type)
    try:
        with _Kernels(device.type):
            yield
    finally:
        stands_for.reset(token)


class _Kernels(TorchFunctionMode):
    """Picks the fused attention that the device would pick: on the meta device it would keep every score."""

    def __init__(self, device: str):
        super().__init__()
        cpu, cuda = aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention
        self.kernel = cpu if device == "cpu" else cuda

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plain = kwargs.get("attn_mask") is None and not kwargs.get("dropout_p") and len(args) == 3
        if func is F.scaled_dot_product_attention and plain:
            out: Tensor = self.kernel(*args, is_causal=kwargs.get("is_causal", False), scale=kwargs.get("scale"))[0]
            return out
        return func(*args, **kwargs)
