"""Loss and perplexity: what the model itself says of the reference texts, as log-probabilities of their tokens."""

from collections.abc import Sequence

import numpy as np

from luthier.metrics.resample import Floats
from luthier.metrics.score import Score, mean_score


def loss(surprise: Sequence[float], tokens: Sequence[int]) -> Score:
    """Mean over the rows of their mean cross-entropy; `surprise` is each row's sum over its `tokens`, in nats."""
    return mean_score(np.array(surprise) / np.array(tokens), "metric:loss|unit:nats/token|mean:rows")


def perplexity(surprise: Sequence[float], tokens: Sequence[int]) -> Score:
    """exp(all nats / all tokens): a metric of the whole set, in which long rows weigh more."""
    rows = np.stack([np.array(surprise, dtype=np.float64), np.array(tokens, dtype=np.float64)], axis=1)
    signature = "metric:perplexity|unit:per token of the tokenizer|mean:tokens"
    return Score(np.exp(rows[:, 0] / rows[:, 1]), signature, statistics=rows, formula=perplexity_from_sums)


def perplexity_from_sums(sums: Floats, examples: int) -> Floats:
    """Perplexity from summed nats and tokens."""
    found: Floats = np.exp(sums[..., 0] / sums[..., 1])
    return found
