"""What a request costs: everything asked for is generated, and the tuning is left as it was."""

import pytest
import torch
from tests import tiny
from tests.logits import all_logits

from luthier.evaluation.speed import NEW_TOKENS, inference_cost
from luthier.models.generate import generate
from luthier.tuning import LoRA, Method, PromptTuning, attach, parameters

METHODS: list[tuple[Method, bool]] = [(LoRA(rank=2), True), (PromptTuning(length=3, init="vocabulary"), False)]


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize(("method", "merges"), METHODS, ids=["lora", "prompt_tuning"])
def test_the_cost_is_of_the_active_tuning_and_changes_nothing(family: str, method: Method, merges: bool) -> None:
    base = tiny.make(family)
    prompts = [[5, 6, 7, 8, 9], [5, 6], [5, 6, 7]]
    bare = inference_cost(base, prompts, None)
    attach(base, "t", method, seed=1)
    with torch.no_grad():
        for parameter in parameters(base, "t").values():
            parameter.add_(torch.randn_like(parameter))
    base.use("t")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    before = all_logits(base, inputs, torch.ones_like(ids))
    cost = inference_cost(base, prompts, "t")
    assert torch.equal(all_logits(base, inputs, torch.ones_like(ids)), before)
    assert cost["prompt_tokens"] == bare["prompt_tokens"] == 3, "the middle one"
    assert (cost["merged"] is not None) == merges and bare["merged"] is None
    for one in (bare, cost, *([cost["merged"]] if merges else [])):
        assert one["first_token_seconds"] > 0 and one["tokens_per_second"] > 0
    own = sum(parameter.numel() * parameter.element_size() for parameter in parameters(base, "t").values())
    assert cost["weights_bytes"] - bare["weights_bytes"] == own


@pytest.mark.parametrize("family", ["llama", "t5", "gpt2"])
def test_without_a_stop_token_all_are_written(family: str) -> None:
    base = tiny.make(family)
    assert [len(ids) for ids in generate(base, [[5, 6, 7], [8]], NEW_TOKENS, [])] == [NEW_TOKENS, NEW_TOKENS]
