"""Ledger: counts the bytes of all tensors that are alive while code runs, by part, and the work that it does.

    live(t) = sum of the storages that exist at t        peak = max over t of live(t)

It sees every operation that PyTorch dispatches, on real tensors and in a dry run (`dry_run.py`), so it needs to know
nothing of architectures. What a kernel allocates for itself it does not see.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from luthier.models.heap import Heap, Place
from luthier.models.kernels.calls import counting

aten = torch.ops.aten
_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: 2,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: 5,
}


class Ledger(TorchDispatchMode):
    """Within it tensors are counted under the part that `part` names when they are made."""

    def __init__(self, heap: Heap | None = None) -> None:
        """What is made within it is also asked of `heap`."""
        super().__init__()
        self.heap = heap
        self.part = "other"
        self.live: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.peak = self._total = self.held = 0  # held: bytes that were there before
        self._tokens: list[Any] = []
        self._made = self._peak_at = 0  # tensors so far, and when the peak was
        self.sums: set[tuple[torch.Size, torch.dtype]] = set()  # of the weights that stand in several places
        self.work: list[tuple[int, int]] = []  # of each operation: floating-point operations in products, bytes moved
        # Of each storage: part, bytes, its place in the heap, its number.
        self._known: dict[Any, tuple[str, int, Place | None, int]] = {}

    def __enter__(self) -> Any:
        self._tokens.append(counting.set(lambda products, moved: self.work.append((products, moved))))
        return super().__enter__()

    def __exit__(self, *args: Any) -> Any:
        counting.reset(self._tokens.pop())
        return super().__exit__(*args)

    def hold(self, tensors: Iterable[Tensor | None], part: str) -> None:
        """Count tensors that exist already under `part`, also those that were counted under another."""
        for tensor in tensors:
            if tensor is None:
                continue
            storage = tensor.untyped_storage()
            key = weakref.ref(storage, self._free)
            if (known := self._known.get(key)) is not None:
                counts = [self.live] + [self.at_peak] * (known[3] <= self._peak_at)
                for count in counts:
                    count[known[0]] -= known[1]
                    count[part] += known[1]
                self._known[key] = (part, *known[1:])
            else:
                self.held += storage.nbytes()
                self._add(key, storage.nbytes(), part, None)

    def restart(self) -> None:
        """Count the peak and the work from here on."""
        self.peak, self.at_peak, self.work = self._total, Counter(self.live), []
        self._peak_at = self._made
        if self.heap:
            self.heap.restart()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _QUESTIONS and args[0].is_meta:
            return _QUESTIONS[func](args[0])
        if func is aten.add.Tensor and self._is_second_gradient(*args[:2]):
            func = aten.add_.Tensor
        out = func(*args, **kwargs)
        found = _tensors((out,))
        fresh = sum(self._note(tensor) for tensor in found)
        packet = func._overloadpacket
        if packet in _ATTENTION:
            products = _attention_products(packet, args)
        else:
            formula = flop_registry.get(packet)
            products = formula(*args, **kwargs, out_val=out) if formula else 0
        if fresh or products or func._schema.is_mutable:
            moved = sum(one.numel() * one.dtype.itemsize for one in (*_tensors(args), *found))
            self.work.append((products, moved))
        return out

    def _is_second_gradient(self, one: Any, other: Any) -> bool:
        """Whether a sum is that of the gradients of a weight's two places: PyTorch adds in place there, unless it is watched."""
        if torch.is_grad_enabled() or not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            return False
        return one.shape == other.shape and (one.shape, one.dtype) in self.sums

    def _note(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = weakref.ref(storage, self._free)
        if key in self._known:
            return 0
        size = storage.nbytes()
        self._add(key, size, self.part, self.heap.take(size) if self.heap else None)
        return size

    def _add(self, key: Any, size: int, part: str, place: Place | None) -> None:
        self._made += 1
        self._known[key] = (part, size, place, self._made)
        self.live[part] += size
        self._total += size
        if self._total > self.peak:
            self.peak, self.at_peak, self._peak_at = self._total, Counter(self.live), self._made

    def _free(self, key: Any) -> None:
        part, size, place, _ = self._known.pop(key)
        self.live[part] -= size
        self._total -= size
        if place is None:
            self.held -= size
        elif self.heap:
            self.heap.free(place, size)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values and in the lists among them."""
    found: list[Tensor] = []
    for one in values:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, (list, tuple)):
            found += [inner for inner in one if isinstance(inner, Tensor)]
    return found


def _attention_products(packet: Any, args: Any) -> int:
    forward = packet is aten._scaled_dot_product_flash_attention_for_cpu
    query, key = args[:2] if forward else args[1:3]
    rows, heads, length, width = query.shape
    return int(_ATTENTION[packet] * rows * heads * length * key.shape[2] * width)  # x 2, and half of it masked


def _number(tensor: Tensor) -> bool | int | float:
    return False if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


# What a dry run's numbers are: parameters change at every step, so nothing computed from them is up to date.
_QUESTIONS: dict[Any, Any] = {
    aten._local_scalar_dense.default: _number,
    aten.equal.default: lambda tensor: False,
    aten.is_nonzero.default: lambda tensor: False,
}
