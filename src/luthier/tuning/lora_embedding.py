"""LoRA on an embedding: the table as a linear over one-hot ids (Hu et al. 2021).

    y[i] = E[i] + s (B A)^T [i]        A: (r, vocabulary), B: (D, r)

As in PEFT, A starts at zero and B normal: a fresh one changes nothing.

    embed_tokens: Embedding   ->   embed_tokens: Grafted(base=Embedding, deltas={name: LowRankEmbedding(A, B)})
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from luthier.models.grafted import Delta


class LowRankEmbedding(Delta):
    """The product B A beside an embedding table, computed in the precision of its output."""

    def __init__(self, base: nn.Embedding, rank: int, scale: float, dropout: float, generator: torch.Generator):
        super().__init__()
        self.lora_embedding_A = Parameter(torch.zeros(rank, base.num_embeddings))
        self.lora_embedding_B = Parameter(torch.randn(base.embedding_dim, rank, generator=generator))
        # Gemma multiplies what it looks up; the delta is looked up in the same table.
        self.factor = float(getattr(base, "scalar_embed_scale", 1.0))
        self.scale = scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x: (...) token ids, y: (..., D), their embeddings."""
        return y + self.looked_up(x, y.dtype)

    def looked_up(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., D): what the product gives for token ids. A token dropped whole would be no regularizer: no dropout."""
        low = F.embedding(x, self.lora_embedding_A.T).to(dtype)
        return F.linear(low, (self.lora_embedding_B * (self.scale * self.factor)).to(dtype))

    def product(self) -> Tensor:
        """s B A: (D, vocabulary), fp32."""
        return self.scale * self.lora_embedding_B.float() @ self.lora_embedding_A.float()

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """E + s (B A)^T."""
        return weight + self.product().T, bias
