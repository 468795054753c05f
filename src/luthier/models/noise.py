"""Noise on the embeddings of training rows (NEFTune, Jain et al. 2023, https://arxiv.org/abs/2310.05914)."""

import torch
from torch import Tensor


def noisy(embedded: Tensor, lengths: tuple[int, ...], alpha: float) -> Tensor:
    """(T, D) embeddings with uniform noise of alpha / sqrt(length x D) on each row."""
    spread = torch.tensor([alpha / (length * embedded.shape[1]) ** 0.5 for length in lengths], device=embedded.device)
    each = spread.repeat_interleave(torch.tensor(lengths, device=embedded.device))
    return embedded + (torch.rand_like(embedded) * 2 - 1) * each[:, None].to(embedded.dtype)
