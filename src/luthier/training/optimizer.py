"""Optimizers on fp32 masters: AdamW (Loshchilov & Hutter 2019), Adafactor (Shazeer & Stern 2018), 8-bit AdamW
(Dettmers et al. 2022).

A 16-bit parameter keeps an fp32 master here: an update of lr x 1 is far below bfloat16's spacing around
a weight and would be lost. fp32 parameters are their own masters.

A master starts anywhere among the numbers that round to its weight. Were it the weight itself, in the middle of them, small
updates of large weights would reach none for many steps; so a part of them crosses over at once, and what all move is on
average what the masters do. The weights themselves are at first those of the base, bit for bit.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from luthier.errors import UserError
from luthier.models.kernels.calls import AdamW, Kernels, kernels_for
from luthier.models.shard import divided_like, local, locals_of
from luthier.training.ranks import ALONE, Ranks

# Numbers updated at a time: fp32 gradients of 16-bit weights exist for one bucket only.
BUCKET = 16_000_000

Kind = Literal["adamw", "adafactor", "adamw_8bit", "paged_adamw_8bit"]
Groups = list[dict[str, Any]]


def _adamw(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def _adafactor(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=0.0)


def _eight_bit(name: str) -> Callable[[Groups], torch.optim.Optimizer]:
    def build(groups: Groups) -> torch.optim.Optimizer:
        if groups[0]["params"][0].device.type != "cuda":
            raise UserError("The 8-bit optimizers work on CUDA devices. Use `optimizer: adamw` or adafactor here.")
        try:
            import bitsandbytes
        except ImportError:
            raise UserError("The 8-bit optimizers need bitsandbytes: pip install 'luthier[quantize]'.") from None
        made: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8)
        return made

    return build


OPTIMIZERS: dict[Kind, Callable[[Groups], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "adamw_8bit": _eight_bit("AdamW8bit"),
    "paged_adamw_8bit": _eight_bit("PagedAdamW8bit"),
}


def master_bytes(parameter: Tensor) -> int:
    """Bytes of the fp32 copy that is stepped in the place of a parameter of another precision."""
    return 0 if parameter.dtype == torch.float32 else 4 * parameter.numel()


def state_bytes(parameter: Tensor, kind: Kind) -> list[int]:
    """Bytes of each tensor that an optimizer of this kind keeps for a parameter: moments, the count of steps."""
    count = parameter.numel()
    if kind == "adamw":
        return [4, 4 * count, 4 * count]
    if kind == "adafactor":  # of a matrix, its rows' and columns' means
        shape = parameter.shape
        return [4, 4 * (count // shape[-1]), 4 * (count // shape[-2])] if parameter.ndim > 1 else [4, 4 * count]
    # blocks of 256 with a scale each; small tensors stay in fp32
    blocks = 4 * -(-count // 256)
    return [4, count, count, blocks, blocks] if count >= 4096 else [4, 4 * count, 4 * count]


def adamw_kernels(kind: Kind, parameter: Tensor) -> Kernels | None:
    """What steps a parameter without an fp32 copy of its gradient, if anything does."""
    return kernels_for(parameter) if kind == "adamw" and parameter.is_contiguous() else None


def bucket_keys(parameters: Mapping[str, Tensor]) -> list[list[str]]:
    """Which parameters are stepped together."""
    buckets: list[list[str]] = []
    held = 0
    for key, one in parameters.items():
        if not buckets or held + one.numel() > BUCKET:
            buckets.append([])
            held = 0
        buckets[-1].append(key)
        held += one.numel()
    return buckets


@torch.no_grad()
def scattered(weight: Tensor, key: str) -> Tensor:
    """fp32 numbers that round to a 16-bit weight, drawn evenly among all that do; a function of the weight and its key."""
    wide = weight.detach().float()
    if wide.is_meta:
        return wide
    # fp32 has so many more bits of mantissa: numbers of the same sign and exponent are neighbours as integers.
    reach = 1 << {torch.bfloat16: 15, torch.float16: 12}[weight.dtype]
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    drawn = torch.randint(1 - reach, reach, wide.shape, generator=generator, dtype=torch.int32).to(wide.device)
    return wide.view(torch.int32).add_(drawn.mul_(wide != 0)).view(torch.float32)


class Optimizer:
    """Steps the parameters of one tuning and can write down and restore all it knows.

    `factors` multiply the learning rate of single parameters.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        weight_decay: float,
        kind: Kind = "adamw",
        factors: Mapping[str, float] | None = None,
        ranks: Ranks = ALONE,
    ):
        self.parameters, self._ranks = dict(parameters), ranks
        # Of what is divided over ranks, each steps its part.
        self._own = locals_of(self.parameters)
        self.masters = {
            key: own if own.dtype == torch.float32 else scattered(own, key) for key, own in self._own.items()
        }
        self._decay, self._factors, self._kind = weight_decay, factors or {}, kind
        self.buckets = [(keys, OPTIMIZERS[kind](self._groups(keys))) for keys in bucket_keys(self.masters)]
        of_master = {id(master): key for key, master in self.masters.items()}
        self._of = {
            of_master[id(master)]: (made, group)
            for _, made in self.buckets
            for group in made.param_groups
            for master in group["params"]
        }

    def step(self, rate: float, clip: float, loss_scale: float = 1.0) -> float:
        """Clip by the global norm, update, clear the gradients; return the norm before clipping.

        Gradients are those of `loss_scale` x loss; where that is above 1 and they overflowed, nothing is updated.
        """
        norm = self._norm() / loss_scale
        if loss_scale > 1 and not math.isfinite(norm):
            for parameter in self.parameters.values():
                parameter.grad = None
            return norm
        scale = min(1.0, clip / (norm + 1e-6)) / loss_scale
        for keys, made in self.buckets:
            self._step_bucket(keys, made, rate, scale)
        return norm

    def _norm(self) -> float:
        """The norm of all gradients together, those of the other ranks' parts too."""
        whole: list[Tensor] = []
        divided: list[Tensor] = []
        for key, parameter in self.parameters.items():
            if parameter.grad is not None:
                norm = _norm(local(parameter.grad))
                (whole if self._own[key] is parameter else divided).append(norm)
        if divided:
            square = float(torch.stack(divided).square().sum())
            whole.append(torch.tensor(self._ranks.add(square)[0], device=divided[0].device).sqrt().float())
        return float(torch.linalg.vector_norm(torch.stack(whole)))

    @torch.no_grad()
    def _step_bucket(self, keys: list[str], made: torch.optim.Optimizer, rate: float, scale: float) -> None:
        for group in made.param_groups:
            group["lr"] = rate * group["factor"]
        keys = [key for key in keys if not self._stepped(key, scale)]
        for key in keys:
            parameter, master = self.parameters[key], self.masters[key]
            if parameter.grad is not None:
                gradient = local(parameter.grad).float()
                parameter.grad = None
                master.grad = gradient.mul_(scale) if scale != 1.0 else gradient
        made.step()
        for key in keys:
            master = self.masters[key]
            master.grad = None
            if master is not self._own[key]:
                self._own[key].copy_(master)

    def _stepped(self, key: str, scale: float) -> bool:
        """Whether a kernel stepped a parameter: AdamW of 16-bit weights, without a copy of their gradient."""
        parameter, master, gradient = self.parameters[key], self.masters[key], self.parameters[key].grad
        kernels = adamw_kernels(self._kind, parameter) if self._own[key] is parameter else None
        if kernels is None or gradient is None or not gradient.is_contiguous():
            return False
        made, group = self._of[key]
        state = made.state[master]
        if not state:
            moments = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
            state.update({"step": torch.zeros(()), **moments})
        state["step"] += 1
        taken, rate, (beta1, beta2) = float(state["step"]), group["lr"], group["betas"]
        corrected, root = rate / (1 - beta1**taken), 1 / math.sqrt(1 - beta2**taken)
        how = AdamW(scale, corrected, rate * group["weight_decay"], beta1, beta2, root, group["eps"])
        kernels.adamw(parameter, master, (state["exp_avg"], state["exp_avg_sq"]), gradient, how)
        parameter.grad = None
        return True

    def _groups(self, keys: list[str]) -> Groups:
        """Parameters that are stepped alike, together: one call for all of them."""
        alike: dict[tuple[float, float], list[Tensor]] = {}
        for key in keys:
            # Decay pulls matrices only: norms, biases (T5's by distance too) and what stands before the rows have no
            # reason to be near zero.
            decay = self._decay if self._is_matrix(key) else 0.0
            alike.setdefault((decay, self._factors.get(key, 1.0)), []).append(self.masters[key])
        return [
            {"params": several, "weight_decay": decay, "factor": factor} for (decay, factor), several in alike.items()
        ]

    def _is_matrix(self, key: str) -> bool:
        last = key.removesuffix(".weight").rpartition(".")[2]
        return self.masters[key].ndim >= 2 and key not in ("prompt_embeddings", "embedding") and "bias" not in last

    def state(self) -> dict[str, Tensor]:
        """Every tensor that decides the next step, by a stable key: the part, a slash, the parameter's key."""
        tensors: dict[str, Tensor] = {}
        for key, master in self.masters.items():
            like = self.parameters[key]
            if master is not self._own[key]:
                tensors[f"master/{key}"] = divided_like(master, like)
            for part, value in self._of[key][0].state.get(master, {}).items():
                if value is not None:
                    tensors[f"{part}/{key}"] = divided_like(torch.as_tensor(value), like)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` wrote down."""
        states: dict[str, dict[str, Any]] = {}
        with torch.no_grad():
            for name, tensor in tensors.items():
                part, _, key = name.partition("/")
                master = self.masters[key]
                if part == "master":
                    master.copy_(tensor)
                else:
                    # bitsandbytes counts its steps in a plain number
                    plain = part == "step" and not tensor.is_floating_point()
                    states.setdefault(key, {})[part] = int(tensor) if plain else tensor.to(master.device)
        for key, state in states.items():
            for part, value in state.items():
                if part.startswith("exp_avg"):
                    _check(f"{part}/{key}", value, self.masters[key])
            self._of[key][0].state[self.masters[key]] = state


def _norm(gradient: Tensor) -> Tensor:
    """Of all its numbers, in fp32; PyTorch's own takes longer for 16 bits on a CPU than the whole step does."""
    kernels = kernels_for(gradient) if gradient.is_contiguous() else None
    return kernels.norm_of(gradient) if kernels else torch.linalg.vector_norm(gradient, dtype=torch.float32)


def _check(name: str, moment: Tensor, master: Tensor) -> None:
    """Raise UserError for a moment that a kernel would read beyond its end."""
    if moment.shape != master.shape or moment.dtype != torch.float32:
        raise UserError(
            f"The checkpoint's {name} is {moment.dtype} of shape {tuple(moment.shape)}, and not float32 of "
            f"{tuple(master.shape)} as its weight's: it is damaged. Delete it, or start anew without --resume."
        )
