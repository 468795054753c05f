"""Passes filled up to few sizes: the same losses and gradients, fewer shapes."""

import pytest
import torch
from tests import tiny
from tests.models.test_parity import batch_of, rows_for

from luthier.encoding.batches import collate
from luthier.models import biased, packing
from luthier.models import run as running
from luthier.models.loss import loss_sum
from luthier.tuning import LoRA, attach, parameters


def test_it_fills_up_to_few_sizes() -> None:
    sizes = [tokens + packing.filler(tokens) for tokens in range(1, 1025)]
    assert all(0 <= packing.filler(tokens) < tokens / 4 + 8 for tokens in range(1, 1025))
    assert len(set(sizes)) == 16 + 8 + 8 + 8 and sizes == sorted(sizes)


@pytest.mark.parametrize("family", tiny.DECODERS + tiny.ENCODER_DECODERS)
def test_it_changes_no_loss_and_no_gradient(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.make(family)
    if not base.on_cpu:
        pytest.skip("passes are filled on a CPU")
    attach(base, "t", LoRA(rank=3), 0)
    base.use("t")
    owned = parameters(base, "t")
    filled: list[int] = []
    original = packing.filler

    def seen(tokens: int) -> int:
        filled.append(original(tokens))
        return filled[-1]

    def run() -> list[torch.Tensor]:
        loss = loss_sum(base, batch_of(base, rows_for(base, count=4)))
        return [loss.detach(), *torch.autograd.grad(loss, list(owned.values()), allow_unused=True)]

    for module in (running, biased):
        monkeypatch.setattr(module, "filler", seen)
    found = run()
    assert any(filled), "nothing was filled up"
    for module in (running, biased):
        monkeypatch.setattr(module, "filler", lambda tokens: 0)
    for one, other in zip(found, run(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_forked_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.make("llama")
    if not base.on_cpu:
        pytest.skip("passes are filled on a CPU")
    start = list(range(5, 45))
    rows = [type(row)(row.id, start + row.prompt, row.target) for row in rows_for(base)]
    batch = collate(rows, None, fork=True)
    assert batch.source.branches and packing.filler(len(batch.source.ids))
    found = loss_sum(base, batch)
    monkeypatch.setattr(running, "filler", lambda tokens: 0)
    torch.testing.assert_close(found, loss_sum(base, batch), atol=1e-4, rtol=1e-6)
