"""Numbers from strings: one file per metric family, no torch. `METRICS` names them all."""

from collections.abc import Callable
from dataclasses import dataclass

from luthier.errors import UserError, nearest
from luthier.metrics import answers, bleu, captions, chrf, labels, losses, nist, resample
from luthier.metrics.accuracy import accuracy
from luthier.metrics.rouge import rouge
from luthier.metrics.score import Score


@dataclass(frozen=True)
class Metric:
    """How a metric is computed, how summed statistics give its value, and how its figures are read.

    `score(predictions, references)` takes texts, each with one or several references; that of `MODEL_METRICS` takes
    each row's nats and tokens.
    """

    score: Callable[..., Score]
    formula: resample.Formula = resample.mean
    scale: int = 100  # shown times this: 100 for what lies in 0-1
    lower_is_better: bool = False
    needs: Callable[[], None] = lambda: None  # raises UserError where something to install is missing


METRICS: dict[str, Metric] = {
    "rouge1": Metric(rouge("rouge1")),
    "rouge2": Metric(rouge("rouge2")),
    "rougeL": Metric(rouge("rougeL")),
    "rougeLsum": Metric(rouge("rougeLsum")),
    "bleu": Metric(bleu.bleu(), bleu.from_sums),
    "bleu_lc": Metric(bleu.bleu(lowercase=True), bleu.from_sums),
    "chrf": Metric(chrf.chrf(), chrf.from_sums),
    "chrf++": Metric(chrf.chrf(word_order=2), chrf.from_sums),
    "nist": Metric(nist.nist, nist.from_sums, scale=1),
    "meteor": Metric(captions.meteor, captions.meteor_from_sums, needs=captions.needs_captions),
    "cider": Metric(captions.cider, scale=1, needs=captions.needs_captions),
    "rougeL_caption": Metric(captions.rouge_l_caption, needs=captions.needs_captions),
    "exact_match": Metric(answers.exact_match("exact_match", answers.plain)),
    "squad_exact_match": Metric(answers.exact_match("squad_exact_match", answers.squad)),
    "token_f1": Metric(answers.token_f1),
    "accuracy": Metric(accuracy),
    "macro_f1": Metric(labels.macro_f1, labels.macro_f1_from_sums),
    "matthews": Metric(labels.matthews, labels.matthews_from_sums),
}

# From the model's own log-probabilities instead of texts.
MODEL_METRICS: dict[str, Metric] = {
    "loss": Metric(losses.loss, scale=1, lower_is_better=True),
    "perplexity": Metric(losses.perplexity, losses.perplexity_from_sums, scale=1, lower_is_better=True),
}


_OF_SHARES = Metric(accuracy)  # how the mean over a mixture's tasks is read


def reading(name: str) -> Metric:
    """How a metric's figures are read, for any name that a report holds."""
    return METRICS.get(name) or MODEL_METRICS.get(name) or _OF_SHARES


def metric(name: str) -> Metric:
    """Look a metric up by name; an unknown one is a UserError with the nearest."""
    if found := METRICS.get(name) or MODEL_METRICS.get(name):
        return found
    raise UserError(f"Unknown metric {name!r}. {nearest(name, [*METRICS, *MODEL_METRICS])}")
