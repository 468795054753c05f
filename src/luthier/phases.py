"""The phases of a stage, run dry: which bytes are alive when each holds the most, by part.

Loading reads the weights, training runs the largest micro-batch forward and backward, validation scores the largest group of
validation rows, answering fills the cache of the longest prompts. All run the code that a stage runs, under a `Ledger`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from luthier.encoding.batches import collate
from luthier.encoding.encoder import Encoded
from luthier.models.allocator import LARGEST_KEPT
from luthier.models.attention import stands_for
from luthier.models.base import BaseModel
from luthier.models.batch import Packed
from luthier.models.frozen import SLICED, only_blocks
from luthier.models.generate import decode_step, prefill
from luthier.models.ledger import Ledger
from luthier.models.loss import label_scores, loss_sum
from luthier.models.quantize import QuantizedLinear
from luthier.models.recompute import recomputed
from luthier.training.settings import TrainingSettings

FEW = 2
# On a CPU: what libraries and products keep for themselves, and the share of holes in the heap. Freed blocks below 32 MiB
# stay in it, so its most and that of the larger blocks add up even where they are not at the same moment.
PROCESS, HOLES = 80_000_000, 0.45

Owned = Mapping[str, Parameter]


def loading(base: BaseModel) -> Counter[str]:
    """Reading holds the weights as they are stored in memory, and packs them from there where they go into 4 bits."""
    ledger = Ledger()
    _hold_weights(base, {}, ledger)
    whole = sum(one.weight.numel() * one.weight.element_size() for one in _packed(base).values())
    return Counter({"weights": ledger.live["weights"], "workspace": whole + PROCESS})


def training(
    base: BaseModel, owned: Owned, groups: Sequence[Sequence[Encoded]], settings: TrainingSettings
) -> tuple[Counter[str], int]:
    """Micro-batches of one step, one after another, and the floating-point operations of their products."""
    ledger = Ledger(LARGEST_KEPT)
    hooks = [
        one.register_post_accumulate_grad_hook(lambda done: ledger.hold([done.grad], "gradients"))
        for one in owned.values()
    ]
    with ledger:
        _hold_weights(base, owned, ledger)
        ledger.restart()
        for group in groups:
            with _parts(base, ledger), recomputed(base.model) if settings.gradient_checkpointing else nullcontext():
                loss = loss_sum(base, _batch(base, group), settings.label_smoothing)
                ledger.part = "activations"
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
    for hook in hooks:
        hook.remove()
    for parameter in owned.values():
        parameter.grad = None
    return _seen(ledger, base), sum(products for products, _ in ledger.work)


def validation(base: BaseModel, owned: Owned, group: Sequence[Encoded]) -> Counter[str]:
    """One group of validation rows."""
    ledger = Ledger(LARGEST_KEPT)
    with ledger:
        _hold_weights(base, owned, ledger)
        ledger.restart()
        with _parts(base, ledger), _few(base):
            label_scores(base, _batch(base, group))
    return _seen(ledger, base)


@torch.no_grad()
def answering(
    base: BaseModel, owned: Owned, prompts: Sequence[Sequence[int]], new_tokens: int, beams: int
) -> Counter[str]:
    """The prompts of one batch, what they leave in the cache, and one step for every beam."""
    ledger = Ledger(LARGEST_KEPT)
    with ledger:
        _hold_weights(base, owned, ledger)
        ledger.restart()
        with _parts(base, ledger), _few(base):
            rows = [list(prompt) for prompt in prompts]
            if base.packs:
                states, cache = prefill(base, rows, new_tokens)
                held = [*cache.keys.values(), *cache.values.values()]
                base.logits(states)
                decode_step(base, cache, torch.zeros(len(rows), dtype=torch.long, device=base.device))
            else:
                held = []
                _read_prompts(base, rows)
    found = _seen(ledger, base)
    seen = sum(one.numel() * one.element_size() for one in held)
    found["activations"] = max(0, found["activations"] - seen)
    found["caches"] = beams * (seen * base.blocks // len(cache.keys) if held else _cache_bytes(base, rows, new_tokens))
    return found


def _seen(ledger: Ledger, base: BaseModel) -> Counter[str]:
    """What was alive at the peak, and what the C allocator holds back: see `HOLES`."""
    found = Counter(ledger.at_peak)
    if stands_for.get() == "cpu":
        kept = ledger.added["small"] * (1 + HOLES) + ledger.added["large"]
        found["workspace"] += max(0, int(kept) - ledger.added["both"]) + PROCESS
    return found


def _few(base: BaseModel) -> AbstractContextManager[None]:
    """Where nothing is kept for a backward pass one block needs what all need: two are run, for the sake of time."""
    return only_blocks(base, 0, FEW, norm=True) if base.family in SLICED and base.blocks > FEW else nullcontext()


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
