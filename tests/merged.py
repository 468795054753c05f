"""A copy of a base with a tuning folded into its weights, module by module."""

import copy

import torch
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

from luthier.models.base import BaseModel
from luthier.models.dense import dense_weight
from luthier.models.grafted import Grafted


def merged_copy(base: BaseModel, name: str) -> BaseModel:
    """The base as if `name`'s weights had always been its own: plain modules, no graft."""
    base.use(name)
    folded = copy.deepcopy(base.model)  # with what the tuning put in place of the base's parameters
    for path, module in list(folded.named_modules()):
        if not isinstance(module, Grafted):
            continue
        plain = module.base
        if (delta := module.delta(name)) is not None:
            bias = getattr(plain, "bias", None)
            merged = delta.merged(dense_weight(plain), None if bias is None else bias.float())
            assert merged is not None, f"{path} does not merge"
            weight = merged[0].T if isinstance(plain, Conv1D) else merged[0]
            plain.weight = Parameter(weight.detach().to(plain.weight.dtype).contiguous())
            if bias is not None:
                plain.bias = Parameter(merged[1].detach().to(bias.dtype))
        parent, _, key = path.rpartition(".")
        setattr(folded.get_submodule(parent), key, plain)
    with torch.no_grad():
        return BaseModel(folded, base.tokenizer)
