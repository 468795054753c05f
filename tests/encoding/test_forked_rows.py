"""Rows that begin alike, laid out as one row with branches, are those rows: losses, gradients, and the tokens run."""

from dataclasses import replace

import pytest
import torch
from tests import tiny
from tests.laws.test_methods import disturb, make_rows

from luthier.encoding.batches import collate
from luthier.encoding.encoder import Encoded
from luthier.models import run as running
from luthier.models.base import BaseModel
from luthier.models.frozen import frozen_states
from luthier.models.loss import label_scores, loss_sum
from luthier.models.packing import filler
from luthier.training.loop import accumulate
from luthier.tuning import LoRA, Method, PrefixTuning, PromptTuning, attach, parameters

START = [5 + number % 90 for number in range(40)]
METHODS: dict[str, Method] = {"lora": LoRA(rank=2), "prompt_tuning": PromptTuning(length=3, init="vocabulary")}


def rows_for(base: BaseModel) -> list[Encoded]:
    """Rows with one beginning; one of them has an earlier answer of its own behind it."""
    rows = [replace(row, prompt=START + row.prompt) for row in make_rows(base, 5)]
    return [*rows[:-1], replace(rows[-1], earlier=((len(START) + 1, len(START) + 3),))]


def tuned(family: str, method: str, dtype: torch.dtype = torch.float32) -> BaseModel:
    base = tiny.make(family, dtype)
    attach(base, "t", METHODS[method])
    disturb(base, "t")
    base.use("t")
    return base


@pytest.mark.parametrize("family", tiny.DECODERS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_forked_rows_have_the_losses_and_gradients_of_rows_apart(family: str, method: str, dtype: torch.dtype) -> None:
    base = tuned(family, method, dtype)
    rows, owned = rows_for(base), parameters(base, "t")
    apart, forked = collate(rows, None), collate(rows, None, fork=True)
    assert forked.tokens == apart.tokens - (len(rows) - 1) * len(START)
    close = (5e-5, 1e-5) if dtype == torch.float32 else (0.05, 0.02)
    found, expected = label_scores(base, forked)[0], label_scores(base, apart)[0]
    torch.testing.assert_close(found, expected, atol=close[0], rtol=close[1])
    gradients = [torch.autograd.grad(loss_sum(base, batch), list(owned.values())) for batch in (forked, apart)]
    largest = max(float(one.abs().max()) for one in gradients[1])
    for key, one, other in zip(owned, *gradients, strict=True):
        tolerance = largest * (1e-5 if dtype == torch.float32 else 1 / 32)
        torch.testing.assert_close(one, other, atol=tolerance, rtol=1e-4, msg=lambda said, key=key: f"{key}: {said}")


def test_what_is_common_ends_before_the_first_state_that_predicts() -> None:
    """Each branch holds the last token of its prompt, whatever else is common."""
    same = [Encoded(str(number), START, [7, 8, number + 9]) for number in range(3)]
    batch = collate(same, None, fork=True)
    assert batch.source.lengths == (len(START) - 1 + 3 * 3,)
    assert batch.source.branches == ((3, 3, 3),)
    answered = [replace(one, earlier=((34, 36),)) for one in same]
    assert collate(answered, None, fork=True).source.branches == ((9, 9, 9),)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_rows_that_bring_states_along_fork_too(family: str) -> None:
    base = tiny.make(family, blocks=3)
    attach(base, "t", LoRA(rank=2, layers=[2]))
    disturb(base, "t")
    base.use("t")
    rows = rows_for(base)
    kept = [replace(row, states=frozen_states(base, collate([row], None).source, 2), frozen=2) for row in rows]
    assert collate(kept, None, fork=True).source.branches
    found = [
        loss_sum(base, collate(each, None, fork=fork)) for each, fork in ((rows, False), (kept, False), (kept, True))
    ]
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found[2], found[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_without_enough_in_common_stay_apart(rows: int) -> None:
    short = [Encoded(str(number), [*START[:31], number + 3, 4], [7, 8]) for number in range(rows)]
    assert collate(short, None, fork=True).source.branches == ()


def test_a_step_runs_what_is_common_once_and_counts_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tuned("llama", "lora")
    rows, seen = rows_for(base), []
    once = running.run_packed
    monkeypatch.setattr(running, "run_packed", lambda *given: seen.append(given[1].shape[1]) or once(*given))
    _, tokens = accumulate(base, rows, 10_000)
    assert tokens == sum(map(len, rows))
    run_once = sum(len(row) - 1 for row in rows) - (len(rows) - 1) * len(START)
    assert seen == [run_once + (filler(run_once) if base.on_cpu else 0)]


def test_which_bases_fork() -> None:
    base = tuned("llama", "lora")
    assert base.forks
    base.embedding_noise = 5.0
    assert not base.forks, "noise is drawn row by row"
    base.embedding_noise = 0.0
    attach(base, "prefix", PrefixTuning(length=2))
    base.use("prefix")
    assert not base.forks
    assert not tiny.make("t5").forks and not tiny.make("opt").forks
