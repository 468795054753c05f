"""What cannot be divided over processes is said; what can is tested in `tests/training/test_ranks.py`."""

import pytest
import torch
from tests import tiny
from torch import nn

from luthier.errors import UserError
from luthier.models.shard import check_shard, shard
from luthier.tuning import Full, LoRA, attach, parameters


def test_what_cannot_be_divided_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="4-bit weights cannot be divided. Take base.quantize out"):
        check_shard(tiny.make("llama", quantize="nf4"))
    mixed = tiny.make("llama", torch.bfloat16)
    attach(mixed, "t", LoRA(rank=2, modules_to_save=["embed_tokens"], untie=True), seed=1)
    with pytest.raises(UserError, match=r"'t' trains weights in torch.bfloat16 and torch.float32.*Set base.dtype"):
        shard(mixed, "t", torch.device("cpu"))
    for family in tiny.DECODERS + tiny.UNPACKED + tiny.ENCODER_DECODERS:
        check_shard(tiny.make(family))
    monkeypatch.setattr("luthier.models.shard.GradientCheckpointingLayer", nn.Bilinear)
    with pytest.raises(UserError, match="the blocks of LlamaForCausalLM are not known"):
        check_shard(tiny.make("llama"))


@pytest.mark.parametrize("lends", [False, True])
def test_full_tuning_copies_the_weights_unless_they_are_lent(lends: bool) -> None:
    base = tiny.make("t5")
    base.lends = lends
    attach(base, "t", Full(), seed=1)
    shared = [one.data_ptr() == base.grafts.originals[key].data_ptr() for key, one in parameters(base, "t").items()]
    assert all(one == lends for one in shared) and shared
