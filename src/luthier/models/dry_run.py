"""A dry run: a skeleton's code runs as on a device, on tensors that have shapes and precisions but no numbers.

What a `Ledger` sees of it (bytes, operations) is what it would see of the real run; nothing is read, and no memory is taken.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from luthier.models.base import BaseModel
from luthier.models.quantize import QuantizedLinear
from luthier.models.where import stands_for


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
        yield
    finally:
        stands_for.reset(token)
