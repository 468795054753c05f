"""Where a step's time goes: the matrix products' share of it, their FLOPs, and what this machine multiplies at.

The achieved fraction is FLOPs of the products / (seconds of the steps x rate of torch.mm on the same shapes).
"""

import math
import statistics
import time
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.models.kernels.calls import Kernels, counting

aten = torch.ops.aten
# Shapes that are timed alone: those with the most FLOPs.
SHAPES, TRIES = 16, 3
Shape = tuple[int, int, int]


def _attention(query: Any, key: Any, value: Any, *_: Any) -> int:
    """Q K^T and P V, counted whole where half is masked; the kernels' is counted as what is seen."""
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


# FLOPs by operator, from its arguments: two for each multiplication and its addition.
PRODUCTS = {
    aten.mm: lambda a, b, *_: 2 * a.shape[0] * a.shape[1] * b.shape[1],
    aten.addmm: lambda _, a, b, *__: 2 * a.shape[0] * a.shape[1] * b.shape[1],
    aten.addmm_: lambda _, a, b, *__: 2 * a.shape[0] * a.shape[1] * b.shape[1],
    aten.bmm: lambda a, b, *_: 2 * math.prod(a.shape) * b.shape[2],
    aten.baddbmm: lambda _, a, b, *__: 2 * math.prod(a.shape) * b.shape[2],
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    # The scores once more, and two products for each of the two.
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, v, *__: 5 * _attention(q, k, v) // 2,
}


# The kernels that are products, which PyTorch does not see; (m, k, n) of the plain ones.
KERNELS: dict[str, Any] = {
    "product": lambda x, w, *_: (*x.shape, w.shape[1]),
    "gradient": lambda g, x: (g.shape[1], len(g), x.shape[1]),
    "narrow": lambda x, w: (len(x), x.shape[1], len(w)),
    "widen": lambda low, w, y: (len(y), len(w), y.shape[1]),
    "outer": lambda low, x: (low.shape[1], len(x), x.shape[1]),
    "attend": None,
    "attend_backward": None,
}


class Products(TorchDispatchMode):
    """Counts FLOPs and seconds of all matrix products inside it; `shapes` holds the FLOPs by (m, k, n) of plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.seconds = 0, 0.0
        self.shapes: Counter[Shape] = Counter()

    def __enter__(self) -> Any:
        self._kernels = {name: getattr(Kernels, name) for name in KERNELS}
        for name, kernel in self._kernels.items():
            setattr(Kernels, name, self._counted(kernel, KERNELS[name]))
        return super().__enter__()

    def __exit__(self, *args: Any) -> Any:
        for name, kernel in self._kernels.items():
            setattr(Kernels, name, kernel)
        return super().__exit__(*args)

    def _counted(self, kernel: Any, shape: Any) -> Any:
        def call(kernels: Kernels, *args: Any) -> Any:
            flops = 0

            def add(work: int, _: int) -> None:
                nonlocal flops
                flops += work

            token = counting.set(add)
            started = time.perf_counter()
            try:
                return kernel(kernels, *args)
            finally:
                self.seconds += time.perf_counter() - started
                counting.reset(token)
                self.flops += flops
                if shape is not None:
                    self.shapes[tuple(map(_typical, shape(*args)))] += flops  # type: ignore[index]

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        count = PRODUCTS.get(func.overloadpacket)
        if count is None:
            return func(*args, **(kwargs or {}))
        started = time.perf_counter()
        found = func(*args, **(kwargs or {}))
        self.seconds += time.perf_counter() - started
        flops = count(*args)
        self.flops += flops
        if func.overloadpacket in (aten.mm, aten.addmm, aten.addmm_):
            a, b = args[-2:] if func.overloadpacket is aten.mm else args[1:3]
            self.shapes[_typical(a.shape[0]), _typical(a.shape[1]), _typical(b.shape[1])] += flops
        return found


def _typical(size: int) -> int:
    """A number of tokens, which is another in every micro-batch, to the nearest 64; a model's widths and ranks stay."""
    return size if size <= 32 or size % 64 == 0 else 64 * max(1, round(size / 64))


def product_rate(shapes: Counter[Shape], dtype: torch.dtype) -> tuple[float, list[dict[str, Any]]]:
    """FLOPs a second of torch.mm alone, over the largest of the shapes, each by its share; and every one of them."""
    timed = []
    for (m, k, n), flops in shapes.most_common(SHAPES):
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        torch.mm(a, b)
        seconds = []
        for _ in range(TRIES):
            started = time.perf_counter()
            torch.mm(a, b)
            seconds.append(time.perf_counter() - started)
        timed.append({"shape": (m, k, n), "flops": flops, "rate": 2 * m * k * n / statistics.median(seconds)})
    return sum(one["flops"] for one in timed) / sum(one["flops"] / one["rate"] for one in timed), timed


def summary(products: Products, profiled_seconds: float, plain_seconds: float, dtype: torch.dtype) -> dict[str, Any]:
    """The profile of one training: `plain_seconds` of its steps alone, `profiled_seconds` of the same steps counted."""
    rate, shapes = product_rate(products.shapes, dtype)
    return {
        "step_flops": products.flops,
        "step_seconds": plain_seconds,
        "product_share": products.seconds / profiled_seconds,
        "product_rate_inside": products.flops / products.seconds,
        "product_rate_alone": rate,
        "achieved_fraction": products.flops / (plain_seconds * rate),
        "shapes": shapes,
    }


def text(found: dict[str, Any]) -> str:
    """The profile in lines of at most 80 columns."""
    lines = [
        f"matrix products     {found['product_share']:6.1%} of the steps' time",
        f"FLOPs of the steps  {found['step_flops'] / 1e9:6.0f} G in {found['step_seconds']:.1f} s, PyTorch's attention whole",
        f"rate of products    {found['product_rate_inside'] / 1e9:6.0f} GFLOP/s inside the steps",
        f"torch.mm alone      {found['product_rate_alone'] / 1e9:6.0f} GFLOP/s on the job's shapes",
        f"achieved            {found['achieved_fraction']:6.1%} of that, over the whole steps",
        "",
        f"{'torch.mm (m, k, n)':28}{'share of FLOPs':>16}{'GFLOP/s':>10}",
    ]
    for one in found["shapes"]:
        lines.append(f"{one['shape']!s:28}{one['flops'] / found['step_flops']:16.1%}{one['rate'] / 1e9:10.0f}")
    return "\n".join(lines)
