"""GELU by its tanh formula (Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415) in one kernel each way.

transformers' `gelu_new`, which GPT-2 and T5's later versions use, is eight operations, each of which keeps its result for the
backward pass. The formula is the same; one kernel rounds once.
"""

from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_SAME = {"NewGELUActivation", "FastGELUActivation"}


def quicken_activations(model: nn.Module) -> None:
    """Let every such activation of a model run as one kernel; the modules stay who they are."""
    for module in model.modules():
        if type(module).__name__ in _SAME:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(_: Any, x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
