"""Which device a tensor is on, or stands for: a skeleton's tensors are on none, and take the paths of the device they stand for."""

from contextvars import ContextVar

from torch import Tensor

# The kind of device that a skeleton's tensors stand for.
stands_for: ContextVar[str] = ContextVar("stands_for", default="cpu")


def kind_of(tensor: Tensor) -> str:
    """`cpu`, `cuda` or another kind of device."""
    return stands_for.get() if tensor.is_meta else tensor.device.type
