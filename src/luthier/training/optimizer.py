"""AdamW (Loshchilov & Hutter 2019) on fp32 masters.

A 16-bit parameter keeps an fp32 master here: an update of lr x 1 is far below bfloat16's spacing around
a weight and would be lost. fp32 parameters are their own masters.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

# Numbers updated at a time: fp32 gradients of 16-bit weights exist for one bucket only.
BUCKET = 16_000_000


class Optimizer:
    """Steps the parameters of one tuning and can write down and restore all it knows."""

    def __init__(self, parameters: Mapping[str, Parameter], weight_decay: float):
        self.parameters = dict(parameters)
        self.masters = {
            key: parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            for key, parameter in self.parameters.items()
        }
        # Decay pulls matrices only: norms, biases and soft prompts have no reason to be near zero.
        self.buckets = [
            (
                keys,
                torch.optim.AdamW(
                    [
                        {"params": [self.masters[key]], "weight_decay": weight_decay if self._is_matrix(key) else 0.0}
                        for key in keys
                    ],
                    lr=0.0,
                    betas=(0.9, 0.999),
                    eps=1e-8,
                    fused=True,
                ),
            )
            for keys in self._bucket_keys()
        ]

    def step(self, rate: float, clip: float) -> float:
        """Clip by the global norm, update, clear the gradients; return the norm before clipping."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        scale = min(1.0, clip / (norm + 1e-6))
        for keys, adam in self.buckets:
            self._step_bucket(keys, adam, rate, scale)
        return norm

    @torch.no_grad()
    def _step_bucket(self, keys: list[str], adam: torch.optim.AdamW, rate: float, scale: float) -> None:
        for key in keys:
            parameter, master = self.parameters[key], self.masters[key]
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                parameter.grad = None
                master.grad = gradient.mul_(scale) if scale != 1.0 else gradient
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        for key in keys:
            parameter, master = self.parameters[key], self.masters[key]
            master.grad = None
            if master is not parameter:
                parameter.copy_(master)

    def _is_matrix(self, key: str) -> bool:
        return self.masters[key].ndim >= 2 and key != "prompt_embeddings"

    def _bucket_keys(self) -> list[list[str]]:
        buckets: list[list[str]] = []
        held = BUCKET
        for key, master in self.masters.items():
            if held + master.numel() > BUCKET:
                buckets.append([])
                held = 0
            buckets[-1].append(key)
            held += master.numel()
        return buckets

    def state(self) -> dict[str, Tensor]:
        """Every tensor that decides the next step, by a stable key."""
        tensors: dict[str, Tensor] = {}
        for key, master in self.masters.items():
            if master is not self.parameters[key]:
                tensors[f"master.{key}"] = master
            for part, value in self._adam(key).state.get(master, {}).items():
                tensors[f"{part}.{key}"] = torch.as_tensor(value)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` wrote down."""
        with torch.no_grad():
            for key, master in self.masters.items():
                if master is not self.parameters[key]:
                    master.copy_(tensors[f"master.{key}"])
                state = {
                    part: tensors[f"{part}.{key}"].to(master.device)
                    for part in ("step", "exp_avg", "exp_avg_sq")
                    if f"{part}.{key}" in tensors
                }
                if state:
                    self._adam(key).state[master] = state

    def _adam(self, key: str) -> torch.optim.AdamW:
        return next(adam for keys, adam in self.buckets if key in keys)
