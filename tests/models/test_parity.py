"""A base's loss and logits are the model's own, whatever shares the batch."""

import random

import pytest
import torch
from tests import tiny

from luthier.encoding.batches import collate, collate_choices
from luthier.encoding.encoder import Encoded
from luthier.models.base import BaseModel
from luthier.models.batch import Batch
from luthier.models.loss import head_loss, label_scores, loss_sum

FAMILIES = tiny.DECODERS + tiny.UNPACKED + tiny.ENCODER_DECODERS + tiny.ABSOLUTE


def rows_for(base: BaseModel, count: int = 5, seed: int = 0) -> list[Encoded]:
    draw = random.Random(seed)
    top = base.embedding.weight.shape[0] - 1
    tokens = lambda least, most: [draw.randint(3, top) for _ in range(draw.randint(least, most))]  # noqa: E731
    return [Encoded(str(number), tokens(3, 20), tokens(1, 9)) for number in range(count)]


def own_losses(base: BaseModel, row: Encoded) -> torch.Tensor:
    """Per-target losses from transformers' own forward on this row alone."""
    target = torch.tensor([row.target], device=base.device)
    if base.encoder_decoder:
        logits = base.model(input_ids=torch.tensor([row.prompt], device=base.device), labels=target).logits[0]
    else:
        base.model.set_attn_implementation("eager")
        ids = torch.tensor([row.prompt + row.target], device=base.device)
        logits = base.model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), target[0], reduction="none")


def start(base: BaseModel) -> int | None:
    return base.decoder_start if base.encoder_decoder else None


def batch_of(base: BaseModel, rows: list[Encoded]) -> Batch:
    return collate(rows, start(base)).to(base.device)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_in_a_batch_equal_the_models_own_row_by_row(family: str) -> None:
    base, plain = tiny.make(family), tiny.make(family)
    rows = rows_for(base)
    with torch.no_grad():
        expected = torch.cat([own_losses(plain, row) for row in rows])
    scores, hits = label_scores(base, batch_of(base, rows))
    torch.testing.assert_close(-scores, expected, atol=2e-5, rtol=1e-5)
    assert hits.shape == scores.shape
    total = loss_sum(base, batch_of(base, rows))
    torch.testing.assert_close(total.detach(), expected.sum(), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours_never_change_a_row(family: str) -> None:
    """Leakage test: a row's loss beside one neighbour or another, of the same shapes, has the same bits."""
    base = tiny.make(family)
    first, second = rows_for(base, 2, seed=1)
    other = Encoded("other", list(reversed(second.prompt)), list(reversed(second.target)))
    ours = [label_scores(base, batch_of(base, [first, beside]))[0][: len(first.target)] for beside in (second, other)]
    assert torch.equal(*ours)
    alone = label_scores(base, batch_of(base, [first]))[0]
    torch.testing.assert_close(ours[0], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", tiny.DECODERS + tiny.ENCODER_DECODERS)
def test_choices_that_share_a_prompt_score_as_if_alone(family: str) -> None:
    base = tiny.make(family)
    row, other = rows_for(base, 2, seed=2)
    choices = [[5, 6, 7], [8], [9, 10], other.target]
    batch, places = collate_choices([("a", row.prompt, choices), ("b", other.prompt, choices[:2])], start(base))
    scores, _ = label_scores(base, batch.to(base.device))
    assert places == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    asked = [(row.prompt, choice) for choice in choices] + [(other.prompt, choice) for choice in choices[:2]]
    for (prompt, choice), found in zip(asked, scores.split([len(choice) for _, choice in asked]), strict=True):
        alone, _ = label_scores(base, batch_of(base, [Encoded("x", prompt, choice)]))
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ("llama", "gemma2", "t5", "t5-gated"))
def test_chunked_loss_has_autograds_gradient(family: str) -> None:
    """The head's loss gives states and head the gradient that plain autograd gives."""
    base = tiny.make(family)
    head = base.model.get_output_embeddings().weight
    head.requires_grad_(True)
    states = torch.randn(600, base.width, device=base.device, requires_grad=True)
    labels = torch.randint(0, head.shape[0], (600,), device=base.device)
    plain = torch.nn.functional.cross_entropy(base.logits(states).float(), labels, reduction="sum")
    expected = torch.autograd.grad(plain * 0.5, [states, head])
    ours = head_loss(base, states, labels)
    found = torch.autograd.grad(ours * 0.5, [states, head], retain_graph=True)
    torch.testing.assert_close(ours, plain)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # they were scaled where they stood
        torch.autograd.grad(ours * 0.5, [states, head])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_loss_without_gradients_takes_no_memory_that_stays() -> None:
    base = tiny.make("llama")
    batch = batch_of(base, rows_for(base))
    with torch.inference_mode():
        alone = loss_sum(base, batch)
    assert not base.scratch._flat
    owned = base.model.get_output_embeddings().weight.requires_grad_(True)
    torch.testing.assert_close(loss_sum(base, batch).detach(), alone.clone())
    assert torch.autograd.grad(loss_sum(base, batch), owned)[0].abs().sum() > 0
