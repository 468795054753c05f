"""The phases of a stage, run dry: which bytes are alive when each holds the most, by part.

Loading reads the weights, training runs the largest micro-batch forward and backward, validation scores the largest group of
validation rows, answering fills the cache of the longest prompts. All run the code that a stage runs, under a `Ledger`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from luthier.encoding.batches import collate, collate_choices
from luthier.encoding.encoder import Encoded
from luthier.evaluation.score import Question
from luthier.models.base import BaseModel
from luthier.models.batch import Packed
from luthier.models.frozen import SLICED, only_blocks
from luthier.models.generate import decode_step, prefill
from luthier.models.heap import Heap
from luthier.models.ledger import Ledger
from luthier.models.loss import head_loss, label_scores
from luthier.models.quantize import QuantizedLinear
from luthier.models.recompute import recomputed
from luthier.models.run import encode, target_states
from luthier.models.stored import Stored
from luthier.models.where import stands_for
from luthier.training.gradients import made_early
from luthier.training.optimizer import Kind, Optimizer, adamw_kernels, bucket_keys, master_bytes, state_bytes
from luthier.training.settings import TrainingSettings
from luthier.work import Work

FEW = 2
# On a CPU, what libraries hold from their first use on, their code, tables and buffers: after reading a base, after training
# one of almost no weights, and bitsandbytes from its import on (docs/planning.md).
READING, PROCESS, PACKING = 40_000_000, 66_000_000, 47_000_000

Owned = Mapping[str, Parameter]


def new_ledger() -> Ledger:
    """What counts the phases of one stage, with the heap that they share where tensors are the process's."""
    return Ledger(Heap() if stands_for.get() == "cpu" else None)


def loading(base: BaseModel, stored: Stored) -> Counter[str]:
    """Reading maps the file of the weights. In another precision they are copied, one by one or while all of it stays; where linears
    are packed into 4 bits, each is let go once it is, and the others are copied.
    """
    ledger = Ledger()
    _hold_weights(base, {}, ledger)
    packed, weights = _packed(base), ledger.live["weights"]
    sizes = {key: one.numel() for key, one in base.grafts.originals.items()}
    most = weights
    if stored.dtype != base.dtype:
        read = 0
        for size in sizes.values() if stored.one_by_one else [sum(sizes.values())]:
            read += size * base.dtype.itemsize
            most = max(most, read + size * stored.dtype.itemsize)
    elif packed:
        most += sum(n for key, n in sizes.items() if key.removesuffix(".weight") not in packed) * base.dtype.itemsize
    workspace = READING + (PACKING if packed else 0) + most - weights
    return Counter({"weights": weights, "workspace": workspace})


def training(
    base: BaseModel, owned: Owned, work: Work, settings: TrainingSettings, ledger: Ledger
) -> tuple[Counter[str], int, list[Any]]:
    """The step with the largest micro-batch, behind another one.

    Also returns the operations of its products, and the optimizer: who drops it says how long its tensors are there.
    """
    hooks = [
        one.register_post_accumulate_grad_hook(lambda done: ledger.hold([done.grad], "gradients"))
        for one in owned.values()
    ]
    ledger.sums = {(owned[key].shape, owned[key].dtype) for key in owned if len(base.grafts.slots.get(key, ())) > 1}
    with ledger:
        _hold_weights(base, owned, ledger)
        ledger.restart()
        ledger.part = "optimizer states"
        optimizer = _DryOptimizer(owned, settings.optimizer)
        _accumulate(base, owned, [work.earlier], settings, ledger)
        optimizer.step(ledger)
        ledger.work = []
        _accumulate(base, owned, work.largest, settings, ledger)
        products = sum(products for products, _ in ledger.work)
        optimizer.step(ledger)
    for hook in hooks:
        hook.remove()
    return _seen(base, ledger), products, [optimizer]


class _DryOptimizer:
    """What an optimizer holds and makes: Adafactor itself; of those that are one kernel, which asks for a device, the tensors."""

    def __init__(self, owned: Owned, kind: Kind):
        self.owned, self.kind = owned, kind
        self.real = Optimizer(owned, 0.0, kind) if kind == "adafactor" else None
        counts = (count for one in owned.values() for count in (master_bytes(one), *state_bytes(one, kind)))
        self.states = [_bytes(count) for count in counts if count and not self.real]

    def step(self, ledger: Ledger) -> None:
        """Step, and let go of the gradients."""
        ledger.part = "optimizer states"
        if self.real:
            self.real.step(1.0, 1.0)
            return
        for keys in bucket_keys(self.owned):
            copies = []  # in fp32, of a bucket's gradients in 16 bits, which kernels read as they are
            for key in keys:
                if (gradient := self.owned[key].grad) is not None:
                    if adamw_kernels(self.kind, gradient) is None:
                        copies.append(gradient.float())
                    self.owned[key].grad = None
            del copies


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="meta")


def _accumulate(
    base: BaseModel, owned: Owned, groups: Sequence[Sequence[Encoded]], settings: TrainingSettings, ledger: Ledger
) -> None:
    ledger.part = "gradients"
    with made_early(owned.values() if base.on_cpu else ()):
        for group in groups:
            with recomputed(base.model, settings.gradient_checkpointing):
                ledger.part = "activations"
                batch = _batch(base, group)
                states = target_states(base, batch)
                # No hook says so: a head with hooks is called, where training runs it as a product.
                ledger.part = "logits"
                loss = head_loss(base, states, batch.labels, settings.label_smoothing)
                ledger.part = "activations"
                del states
                loss.backward()  # type: ignore[no-untyped-call]
                del loss


def interpolating(base: BaseModel, owned: Owned, change: Callable[[], None], ledger: Ledger) -> Counter[str]:
    """Reading a tuning's file, and taking its weights back towards the base's, which is what `change` does."""
    with ledger:
        _hold_weights(base, owned, ledger)
        ledger.restart()
        ledger.part = "workspace"
        file = _bytes(sum(one.numel() * one.itemsize for one in owned.values()))
        del file
        change()
    return _seen(base, ledger)


def validation(base: BaseModel, owned: Owned, group: Sequence[Encoded], ledger: Ledger) -> Counter[str]:
    """One group of validation rows."""
    with ledger:
        _hold_weights(base, owned, ledger)
        ledger.restart()
        with _parts(base, ledger), _few(base):
            label_scores(base, _batch(base, group))
    return _seen(base, ledger)


def choosing(base: BaseModel, owned: Owned, rows: Sequence[Question], ledger: Ledger) -> Counter[str]:
    """One group of questions whose choices are ranked."""
    with ledger:
        _hold_weights(base, owned, ledger)
        ledger.restart()
        batch, _ = collate_choices(rows, base.decoder_start if base.encoder_decoder else None)
        with _parts(base, ledger), _few(base):
            label_scores(base, batch.to(base.device))
    return _seen(base, ledger)


@torch.no_grad()
def answering(
    base: BaseModel,
    owned: Owned,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    beams: int,
    ledger: Ledger,
    given_back: bool,
) -> Counter[str]:
    """The prompts of one batch, what they leave in the cache, and one step for every beam.

    `given_back`: what a training held went back before. Each block then finds other holes to fill, so that all are run.
    """
    rows = [list(prompt) for prompt in prompts]
    some: Callable[[BaseModel], AbstractContextManager[None]] = (lambda _: nullcontext()) if given_back else _few
    if given_back and ledger.heap:
        ledger.heap.give_back()
    with ledger:
        _hold_weights(base, owned, ledger)
        ledger.restart()
        if base.packs:
            with _parts(base, ledger), some(base):
                states, cache = prefill(base, rows, new_tokens, beams)
                ledger.hold([one for rooms in cache.rooms.values() for one in rooms], "caches")
                base.logits(states)
            cache.keep([place for place in range(len(rows)) for _ in range(beams)])
            with _parts(base, ledger), some(base):
                states = decode_step(base, cache, torch.zeros(len(rows) * beams, dtype=torch.long, device=base.device))
                base.logits(states).float().log_softmax(-1)
            return _seen(base, ledger)
        with _parts(base, ledger), some(base):
            _read_prompts(base, rows)
    found = _seen(base, ledger)
    found["caches"] = beams * _cache_bytes(base, rows, new_tokens)
    found["logits"] = (
        beams * len(rows) * base.config.get_text_config(decoder=True).vocab_size * (4 + base.dtype.itemsize)
    )
    return found


def _seen(base: BaseModel, ledger: Ledger) -> Counter[str]:
    """What was alive at the peak, and what the heap holds beyond it at its own."""
    found = Counter(ledger.at_peak)
    if ledger.heap:
        found["workspace"] += ledger.held + ledger.heap.most - ledger.peak + PROCESS
        found["workspace"] += PACKING if _packed(base) else 0
    return found


def _few(base: BaseModel) -> AbstractContextManager[None]:
    """Where nothing is kept for a backward pass one block needs what all need: two are run, for the sake of time."""
    return only_blocks(base, 0, FEW, norm=True) if base.family in SLICED and base.blocks > FEW else nullcontext()


def _read_prompts(base: BaseModel, rows: list[list[int]]) -> None:
    """Run prompts as padded decoding does at its start, without the cache."""
    if base.encoder_decoder:
        flat = torch.tensor([token for row in rows for token in row], device=base.device)
        encode(base, Packed(flat, tuple(map(len, rows))), ())
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
    return collate(rows, base.decoder_start if base.encoder_decoder else None, base.forks).to(base.device)


class _parts:
    """Within it tensors are activations until the head runs, and logits from there on."""

    def __init__(self, base: BaseModel, ledger: Ledger):
        self.head, self.ledger = base.model.get_output_embeddings(), ledger

    def __enter__(self) -> None:
        self.ledger.part = "activations"
        self.handle = self.head.register_forward_pre_hook(lambda *_: setattr(self.ledger, "part", "logits"))

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()
