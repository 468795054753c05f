"""A base whose weights are divided over processes: FSDP2 (Zhao et al. 2023, https://arxiv.org/abs/2304.11277).

Of every weight a rank keeps 1/N, its first dimension cut in N; a block's are gathered for as long as it runs. What a
tuning owns inside the model (its deltas, its copies of weights) is divided with it; soft prompts and prefixes stand
before the rows and stay whole on every rank. Everything here is for one tuning: the base alone is not to be had back.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier.errors import UserError
from luthier.models.base import BaseModel

Result = TypeVar("Result")


def check_shard(base: BaseModel) -> None:
    """Raise UserError for a base that cannot be divided; a skeleton will do."""
    if base.quantized:
        raise UserError("training.shard: 4-bit weights cannot be divided. Take base.quantize out, or shard: false.")
    if not _blocks(base):
        raise UserError(f"training.shard: the blocks of {type(base.model).__name__} are not known. Set it to false.")


def shard(base: BaseModel, name: str | None, device: torch.device) -> None:
    """Divide the base with the tuning `name` in it over the ranks of the process group, each part on `device`.

    Raises UserError as `check_shard` does, and for a tuning that trains two precisions.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    check_shard(base)
    model = base.model
    base.use(name)
    dtypes = {one.dtype for one in model.parameters() if one.requires_grad}
    if len(dtypes) > 1:
        raise UserError(
            f"training.shard: {name!r} trains weights in {' and '.join(sorted(map(str, dtypes)))}, which are divided "
            "together. Set base.dtype to float32, or shard: false."
        )
    base.keep_fingerprint()
    for prompt in base.grafts.prompts.values():
        prompt.data = prompt.data.to(device)
    for prefix in base.grafts.prefixes.values():
        prefix.to(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in [*_blocks(base), model]:
        one: Any = fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        # The loss is a sum over the ranks, divided by the whole batch's targets already.
        one.set_gradient_divide_factor(1.0)
        one.set_force_sum_reduction_for_comms(True)
        base.grafts.adopt()  # lets go of this block's whole weights, before the device has to hold the next one's
    # T5's blocks give their bias by distance as a view, which nobody writes into.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    model.run_inside = lambda function: function()
    register_fsdp_forward_method(model, "run_inside")
    base.sharded = True


def inside(base: BaseModel, function: Callable[[], Result]) -> Result:
    """What `function` gives, which runs the base: the weights outside its blocks are whole meanwhile.

    Every rank must call it with a function that runs the blocks as often.
    """
    if not base.sharded:
        return function()
    found: Result = base.model.run_inside(function)
    if not torch.is_grad_enabled():
        base.model.reshard()
    return found


def is_divided(tensor: Tensor) -> bool:
    """Whether ranks hold parts of it."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a divided tensor, sharing its memory; any other tensor itself."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A divided tensor gathered, on every rank at once; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_like(part: Tensor, like: Tensor) -> Tensor:
    """This rank's `part` as the divided tensor of which `like` is one; itself where `like` is not divided."""
    if not isinstance(like, DTensor) or part.shape != like.to_local().shape:
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def read_parts(path: Path, like: Callable[[str], Tensor | None]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A safetensors file's metadata and tensors; of one that is divided like `like(key)` only this rank's part is read."""
    with safe_open(path, framework="pt") as file:
        found = {}
        for key in file.keys():  # noqa: SIM118 (no dict)
            other, piece = like(key), file.get_slice(key)
            if isinstance(other, DTensor) and list(piece.get_shape()) == list(other.shape):
                mesh = other.device_mesh
                size = -(-other.shape[0] // mesh.size())
                start = min(size * mesh.get_local_rank(), other.shape[0])
                found[key] = piece[start : min(start + size, other.shape[0])]
            else:
                found[key] = file.get_tensor(key)
        return dict(file.metadata() or {}), found


def locals_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of each."""
    return {key: local(tensor) for key, tensor in tensors.items()}


def _blocks(base: BaseModel) -> list[torch.nn.Module]:
    return [module for module in base.model.modules() if isinstance(module, GradientCheckpointingLayer)]
