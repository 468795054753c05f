"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, https://arxiv.org/abs/2402.09353).

    y = m * (W + s B A) x / ||W + s B A||        m: (out,), the norm of each row of W at the start

LoRA turns a row's direction, m alone sets its length. The norm is not differentiated (section 4.3). For an embedding
W is the table's transpose. The base may be quantized: its weight is read as fp32 numbers.

    q_proj: Linear   ->   q_proj: Grafted(base=Linear, deltas={name: DoRA(A, B, m)})
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from luthier.models.dense import dense_weight
from luthier.tuning.lora_embedding import LowRankEmbedding
from luthier.tuning.low_rank import LowRank, features

_CPU = torch.device("cpu")


class Norms:
    """||W + s B A|| of each output; computed again only when A or B have changed."""

    def __init__(self, base: nn.Module):
        self.base = base
        self.seen: tuple[Tensor, Tensor] | None = None
        self.norms = torch.empty(0)

    @torch.no_grad()
    def of(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """(out,), fp32."""
        # Compared by value: a fused optimizer writes without counting up a tensor's version.
        if self.seen is None or not (_same(a, self.seen[0]) and _same(b, self.seen[1])):
            weight = dense_weight(self.base)
            weight = weight.T if isinstance(self.base, nn.Embedding) else weight
            self.norms = (weight + scale * b.float() @ a.float()).norm(dim=1)
            self.seen = a.detach().clone(), b.detach().clone()
        return self.norms


def _start(norms: Callable[[], Tensor], outputs: int, device: torch.device) -> Parameter:
    """The magnitudes at the start; on a skeleton, which has no weights, their shape alone."""
    return Parameter(torch.empty(outputs, device=device) if device.type == "meta" else norms().clone())


def _same(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one, other)


class DoRA(LowRank):
    """A LowRank whose sum with the base's weight is scaled to length m, row by row."""

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        scale: float,
        dropout: float,
        generator: torch.Generator,
        device: torch.device = _CPU,
    ):
        super().__init__(features(base), rank, scale, dropout, generator)
        self.to(device)
        self.norms = Norms(base)
        self.lora_magnitude_vector = _start(self._norms, features(base)[1], device)

    def _norms(self) -> Tensor:
        return self.once("norms", self._norms_now)

    def derive(self, dtype: torch.dtype) -> None:
        """The norms that magnitudes are divided by."""
        self._norms()

    def _norms_now(self) -> Tensor:
        return self.norms.of(self.lora_A.weight, self.lora_B.weight, self.scale)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x: (..., in), y: (..., out), the base's output for x, of which a bias is not scaled."""
        ratio = self.lora_magnitude_vector / self._norms()
        if self.dropout and torch.is_grad_enabled():
            x = F.dropout(x, self.dropout)
        low = F.linear(x, self.lora_A.weight.to(x.dtype))
        bias = getattr(self.norms.base, "bias", None)
        plain = y if bias is None else y - bias.to(y.dtype)
        turned = F.linear(low, (self.lora_B.weight * (self.scale * ratio)[:, None]).to(x.dtype))
        return y + (ratio - 1).to(y.dtype) * plain + turned

    def as_product(self, base: nn.Module) -> None:
        """None: what the base makes of x is scaled first."""
        return None

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """m (W + s B A) / ||W + s B A||."""
        whole = weight + self.scale * self.lora_B.weight.float() @ self.lora_A.weight.float()
        return whole * (self.lora_magnitude_vector / whole.norm(dim=1))[:, None], bias


class DoRAEmbedding(LowRankEmbedding):
    """DoRA on an embedding: m holds a length for each of the D columns of the table."""

    def __init__(
        self,
        base: nn.Embedding,
        rank: int,
        scale: float,
        dropout: float,
        generator: torch.Generator,
        device: torch.device = _CPU,
    ):
        super().__init__(base, rank, scale, dropout, generator)
        self.to(device)
        self.norms = Norms(base)
        self.lora_magnitude_vector = _start(self._norms, base.embedding_dim, device)

    def _norms(self) -> Tensor:
        return self.once("norms", self._norms_now)

    def derive(self, dtype: torch.dtype) -> None:
        """The norms that magnitudes are divided by."""
        self._norms()

    def _norms_now(self) -> Tensor:
        return self.norms.of(self.lora_embedding_A, self.lora_embedding_B, self.scale)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x: (...) token ids, y: (..., D), their embeddings."""
        ratio = (self.lora_magnitude_vector / self._norms()).to(y.dtype)
        return ratio * (y + self.looked_up(x, y.dtype))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """m (E^T + s B A) / ||E^T + s B A||, transposed."""
        whole = weight.T + self.product()
        return (whole * (self.lora_magnitude_vector / whole.norm(dim=1))[:, None]).T.contiguous(), bias
