"""The numbers of a merge certificate, against a plain loop over transformers' own logits."""

import math

import pytest
import torch
from tests import tiny
from tests.laws.test_methods import disturb, make_rows
from torch import Tensor

from luthier.encoding.encoder import Encoded
from luthier.errors import UserError
from luthier.evaluation.certificate import Drift, drift
from luthier.models.base import BaseModel
from luthier.tuning import LoRA, attach


def logits(base: BaseModel, row: Encoded) -> Tensor:
    """A row's logits at its targets, from the model's own forward in eager attention."""
    model = base.model
    with torch.no_grad():
        if base.encoder_decoder:
            return model(input_ids=torch.tensor([row.prompt]), labels=torch.tensor([row.target])).logits[0].double()
        model.set_attn_implementation("eager")
        ids = torch.tensor([row.prompt + row.target])
        return model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].double()


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_drift_is_the_plain_loop(family: str) -> None:
    ours, other = tiny.make(family), tiny.make(family)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    rows = make_rows(ours, 9)
    found = drift(ours, other, rows)
    kl, flips, largest, losses, count = 0.0, 0, 0.0, [0.0, 0.0], 0
    for row in rows:
        a, b = logits(ours, row), logits(other, row)
        for place, token in enumerate(row.target):
            p, q = a[place].softmax(-1), b[place].softmax(-1)
            kl += float((p * (p / q).log()).sum())
            flips += int(p.argmax() != q.argmax())
            largest = max(largest, float((a[place] - b[place]).abs().max()))
            losses[0] -= float(p[token].log())
            losses[1] -= float(q[token].log())
            count += 1
    assert found.tokens == count and found.flips == flips / count > 0
    assert found.largest_logit_difference == pytest.approx(largest, rel=1e-4)
    assert found.kl == pytest.approx(kl / count, rel=1e-4)
    assert (found.reference_loss, found.loss) == pytest.approx([loss / count for loss in losses], rel=1e-5)


def test_a_model_does_not_drift_from_itself_and_its_tuning_does() -> None:
    base, same = tiny.make("llama"), tiny.make("llama")
    attach(same, "t", LoRA(rank=2))
    disturb(same, "t")
    rows = make_rows(base)
    nothing = drift(base, same, rows)
    assert (nothing.kl, nothing.flips, nothing.largest_logit_difference) == (0.0, 0.0, 0.0)
    assert nothing.loss == nothing.reference_loss and nothing.within(0, 0)
    same.use("t")
    assert drift(base, same, rows).kl > 1e-3


def test_both_limits_count() -> None:
    found = Drift(tokens=10, largest_logit_difference=1.0, kl=0.01, flips=0.1, reference_loss=1.0, loss=1.0)
    assert found.within(0.01, 0.1)
    assert not found.within(0.0099, 0.1) and not found.within(0.01, 0.09)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_is_infinitely_far_and_no_reference(wrong: float) -> None:
    base, broken = tiny.make("llama"), tiny.make("llama")
    with torch.no_grad():
        broken.model.model.norm.weight[3] = wrong
    rows = make_rows(base)
    found = drift(base, broken, rows)
    assert found.kl == found.largest_logit_difference == math.inf
    assert not found.within(math.inf, 1.0)
    with pytest.raises(UserError, match="NaN or infinite"):
        drift(broken, base, rows)
