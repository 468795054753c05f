"""The phases of a stage, run dry: which bytes are alive when each holds the most, by part.

Loading reads the weights, training runs the largest micro-batch forward and backward, validation scores the largest group of
validation rows, answering fills the cache of the longest prompts. All run the code that a stage runs, under a `Ledger`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from luthier.encoding.batches import collate
from luthier.encoding.encoder import Encoded
from luthier.models.base import BaseModel
from luthier.models.batch import Packed
from luthier.models.generate import decode_step, prefill
from luthier.models.ledger import Ledger
from luthier.models.loss import label_scores, loss_sum
from luthier.models.quantize import QuantizedLinear
from luthier.models.recompute import recomputed
from luthier.training.settings import TrainingSettings

Owned = Mapping[str, Parameter]


def loading(base: BaseModel) -> Counter[str]:
    """Reading holds the weights as they are stored in memory, and packs them from there where they go into 4 bits."""
    ledger = Ledger()
    _hold_weights(base, {}, ledger)
    whole = sum(one.weight.numel() * one.weight.element_size() for one in _packed(base).values())
    return Counter({"weights": ledger.live["weights"], "workspace": whole})


def training(
    base: BaseModel, owned: Owned, group: Sequence[Encoded], several: bool, settings: TrainingSettings
) -> tuple[Counter[str], int]:
    """A step's largest micro-batch, one of `several`, and the floating-point operations of its products."""
    ledger = Ledger()
    hooks = [
        one.register_post_accumulate_grad_hook(lambda done: ledger.hold([done.grad], "gradients"))
        for one in owned.values()
    ]
    with ledger:
        _hold_weights(base, owned, ledger)
        if several:  # an earlier micro-batch has left its gradients
            for parameter in owned.values():
                parameter.grad = torch.zeros_like(parameter)
                ledger.hold([parameter.grad], "gradients")
        ledger.restart()
        with _parts(base, ledger), recomputed(base.model) if settings.gradient_checkpointing else nullcontext():
            loss = loss_sum(base, _batch(base, group), settings.label_smoothing)
            ledger.part = "activations"
            loss.backward()  # type: ignore[no-untyped-call]
    for hook in hooks:
        hook.remove()
    for parameter in owned.values():
        parameter.grad = None
    return ledger.at_peak, sum(products for products, _ in ledger.work)


def validation(base: BaseModel, owned: Owned, group: Sequence[Encoded]) -> Counter[str]:
    """One group of validation rows."""
    ledger = Ledger()
    with ledger:
        _hold_weights(base, owned, ledger)
        ledger.restart()
        with _parts(base, ledger):
            label_scores(base, _batch(base, group))
    return ledger.at_peak


@torch.no_grad()
def answering(
    base: BaseModel, owned: Owned, prompts: Sequence[Sequence[int]], new_tokens: int, beams: int
) -> Counter[str]:
    """The prompts of one batch, what they leave in the cache, and one step for every beam."""
    ledger = Ledger()
    with ledger:
        _hold_weights(base, owned, ledger)
        ledger.restart()
        with _parts(base, ledger):
            rows = [list(prompt) for prompt in prompts]
            if base.packs:
                states, cache = prefill(base, rows, new_tokens)
                held = [*cache.keys.values(), *cache.values.values()]
                base.logits(states)
                decode_step(base, cache, torch.zeros(len(rows), dtype=torch.long, device=base.device))
            else:
                held = []
                _read_prompts(base, rows)
    found = ledger.at_peak
    caches = sum(one.numel() * one.element_size() for one in held) or _cache_bytes(base, rows, new_tokens)
    found["activations"] = max(0, found["activations"] - sum(one.numel() * one.element_size() for one in held))
    found["caches"] = caches * beams
    return found


def _read_prompts(base: BaseModel, rows: list[list[int]]) -> None:
    """Run prompts as padded decoding does at its start, without the cache."""
    if base.encoder_decoder:
        flat = torch.tensor([token for row in rows for token in row], device=base.device)
        base.encode(Packed(flat, tuple(map(len, rows))), ())
    else:
        label_scores(base, _batch(base, [Encoded("", row, [0]) for row in rows]))


def _cache_bytes(base: BaseModel, rows: list[list[int]], new_tokens: int) -> int:
    """Keys and values that transformers' own decoding keeps: of an encoder-decoder, also of what the encoder read."""
    config = base.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "d_kv", None) or config.hidden_size // config.num_attention_heads
    places = max(map(len, rows)) + new_tokens
    return int(2 * base.blocks * len(rows) * heads * width * places * base.dtype.itemsize)


def _packed(base: BaseModel) -> dict[str, QuantizedLinear]:
    return {path: one for path, one in base.grafts.modules.items() if isinstance(one, QuantizedLinear)}


def _hold_weights(base: BaseModel, owned: Mapping[str, Tensor], ledger: Ledger) -> None:
    packed = _packed(base)
    stand_ins = {f"{path}.weight" for path in packed}
    ledger.hold([tensor for key, tensor in base.grafts.originals.items() if key not in stand_ins], "weights")
    for one in packed.values():
        ledger.hold([one.packed, one.state.absmax], "weights")
    ledger.hold([*base.model.buffers(), *owned.values()], "weights")


def _batch(base: BaseModel, rows: Sequence[Encoded]) -> Any:
    return collate(rows, base.decoder_start if base.encoder_decoder else None).to(base.device)


class _parts:
    """Within it tensors are activations until the head runs, and logits from there on."""

    def __init__(self, base: BaseModel, ledger: Ledger):
        self.head, self.ledger = base.model.get_output_embeddings(), ledger

    def __enter__(self) -> None:
        self.ledger.part = "activations"
        self.handle = self.head.register_forward_pre_hook(lambda *_: setattr(self.ledger, "part", "logits"))

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()
