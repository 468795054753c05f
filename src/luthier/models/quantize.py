"""4-bit base weights: NormalFloat (Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314).

    W[i] = code[q[i]] * absmax[i // 64]        q: 4 bits a weight, code: the 16 quantiles of a normal

With double quantization the absmax of the blocks are 8-bit numbers themselves (4.13 bits a weight in all, 4.5 without).

    q_proj: Linear   ->   q_proj: QuantizedLinear

Every linear but the output head is quantized; embeddings, norms and biases stay as they are. A tuning holds its base
layer, so it needs no second implementation. bitsandbytes packs and unpacks; the product is ours, because its own layer
repacks the weights inside forward where nothing asks for gradients, and so changes them under a tuning that trains.
"""

import copy
import logging
import threading
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

from luthier.errors import UserError
from luthier.models.allocator import give_back_freed_memory
from luthier.models.kernels.calls import FourBits
from luthier.models.mapped import MappedFiles
from luthier.models.scratch import Scratch
from luthier.models.where import kind_of

Quantization = Literal["nf4"]
BLOCK = 64
PART = 4096  # blocks that are unpacked at once


class Rooms(threading.local):
    """Where a weight stands while it is multiplied with: all linears of a model share one place, each thread its own."""

    def __init__(self) -> None:
        self.scratch, self.inference = Scratch(), Scratch()

    def __deepcopy__(self, memo: Any) -> "Rooms":
        return Rooms()

    def own(self) -> Scratch:
        """What is made in inference mode may not be written outside it."""
        return self.inference if torch.is_inference_mode_enabled() else self.scratch


class QuantizedLinear(nn.Linear):
    """A frozen linear whose weight is kept in 4 bits and unpacked for each product.

    `weight` is on the meta device: it tells shape and precision and holds no numbers, which `dense_weight` has.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Parameter | None,
        device: torch.device,
        double: bool,
        transposed: bool = False,
        rooms: Rooms | None = None,
    ):
        nn.Module.__init__(self)
        self.rooms = rooms or Rooms()
        self.transposed = transposed  # the architecture stores (in, out), as GPT-2 does
        self.out_features, self.in_features = weight.shape
        self.weight = Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        self.register_parameter("bias", bias)
        self.packed: Tensor | None
        self.register_buffer("packed", None)
        self.state: Any = None  # bitsandbytes' QuantState: absmax, code, shape, precision
        if not weight.is_meta:
            self.pack(weight.detach().to(device), double)

    def pack(self, weight: Tensor, double: bool) -> None:
        """Take the numbers of a weight (out, in) into 4 bits."""
        # One block a row: bitsandbytes' CPU kernel misreads rows of, say, 48 numbers, which no block divides.
        flat = weight.flatten()
        blocks = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        self.packed, self.state = _functional().quantize_4bit(
            blocks, blocksize=BLOCK, compress_statistics=double, quant_type="nf4"
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) to (..., out)."""
        return _Product.apply(x, self.bias, self)  # type: ignore[no-any-return]

    def dequantized(self) -> Tensor:
        """The weight (out, in) in the base's precision, exactly as the products use it."""
        assert self.packed is not None, "a skeleton has no weights"
        blocks: Tensor = _functional().dequantize_4bit(self.packed, self.state)
        return blocks.flatten()[: self.weight.numel()].view(self.weight.shape)

    def unpacked(self) -> Tensor:
        """The same for a product at once: it is gone when the next linear's is asked for.

        On a CPU by parts: a whole weight leaves a hole in the heap that after a few smaller tensors fits no other one.
        """
        assert self.packed is not None, "a skeleton has no weights"
        numbers = self.packed.view(torch.uint8).flatten()  # it may be kept as others, of several bytes
        if kind_of(numbers) == "cuda" or self.state.blocksize != BLOCK or numbers.numel() % (BLOCK // 2):
            return self.dequantized()
        packed, scale = numbers.view(-1, BLOCK // 2), self._scale()
        room = self.rooms.own().take("weight", (len(packed), BLOCK), packed, self.state.dtype)
        for start in range(0, len(packed), PART):
            part = packed[start : start + PART]
            room[start : start + PART] = torch.ops.bitsandbytes.dequantize_4bit.default(
                part.reshape(-1, 1),
                scale[start : start + PART],
                BLOCK,
                self.state.quant_type,
                (len(part), BLOCK),
                self.state.dtype,
            )
        return room.view(-1)[: self.weight.numel()].view(self.weight.shape)

    def _scale(self) -> Tensor:
        """What each block's numbers are times."""
        scale: Tensor = self.state.absmax
        if self.state.nested:
            scale = _functional().dequantize_blockwise(scale, self.state.state2) + self.state.offset
        return scale.float()

    def four_bits(self, by_rows: bool, dtype: torch.dtype) -> FourBits | None:
        """The weight as the kernels read it, for products in this precision; None where they do not know how it is packed."""
        state = self.state
        if (
            state is None
            or self.packed is None
            or (state.quant_type, state.blocksize, state.dtype) != ("nf4", BLOCK, dtype)
        ):
            return None
        if self.in_features % BLOCK or self.out_features % 2:
            return None
        shape = (self.in_features, self.out_features) if by_rows else (self.out_features, self.in_features)
        return FourBits(self.packed, self._scale(), state.code, by_rows, shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        # The stand-in stays on the meta device, which has nothing to move.
        stand_in = self._parameters.pop("weight")
        super()._apply(fn, recurse)
        self._parameters = {"weight": stand_in, **self._parameters}
        if self.packed is not None:
            self.state.to(self.packed.device)
        return self


class _Product(torch.autograd.Function):
    """y = x W^T + b. Keeps the packed weight for the backward pass, never the unpacked one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.unpacked().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (upstream,) = outputs
        wanted_x, wanted_bias, _ = ctx.needs_input_grad
        into_x = upstream @ ctx.layer.unpacked().to(upstream.dtype) if wanted_x else None
        return into_x, upstream.reshape(-1, upstream.shape[-1]).sum(0) if wanted_bias else None, None


def is_packed(model: Any) -> bool:
    """Whether a model was saved in bitsandbytes' 4 bits."""
    found = getattr(model.config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return "bitsandbytes" in str(getattr(method, "value", method))


def adopt_packed(model: Any) -> None:
    """Put our layer in the place of each that was saved in 4 bits; the numbers stay."""
    rooms = Rooms()
    for path, module in list(model.named_modules()):
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None:
            continue
        out, inputs = state.shape
        weight, device = torch.empty(out, inputs, dtype=state.dtype, device="meta"), torch.device("meta")
        layer = QuantizedLinear(weight, module.bias, device, state.nested, rooms=rooms)
        layer.packed, layer.state = module.weight.data, copy.copy(state)
        if out * inputs % state.blocksize == 0:
            layer.state.shape = torch.Size((out * inputs // state.blocksize, state.blocksize))
        parent, _, key = path.rpartition(".")
        setattr(model.get_submodule(parent), key, layer)


def quantize_linears(model: Any, device: torch.device, double: bool, files: MappedFiles) -> None:
    """Replace every linear but the output head by its 4-bit form on `device`, one after another, and let go of their pages.

    On the meta device only the shapes change. Raises UserError where bitsandbytes is not installed.
    """
    _functional()
    head = model.get_output_embeddings()
    paths = [path for path, one in model.named_modules() if isinstance(one, (nn.Linear, Conv1D)) and one is not head]
    rooms = Rooms()
    for path in paths:  # (a list of the modules would keep every dense weight alive to the end)
        parent, _, key = path.rpartition(".")
        owner = model.get_submodule(parent)
        module: Any = getattr(owner, key)
        turned = isinstance(module, Conv1D)
        weight = module.weight.T if turned else module.weight
        packed = QuantizedLinear(weight, module.bias, device, double, turned, rooms)
        setattr(owner, key, packed)
        if packed.packed is not None:
            files.let_go(module.weight)
            give_back_freed_memory()  # one weight's packing leaves holes that the next one's does not fit
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.clone()  # as long as one is mapped from the file, all of it stays in memory


def _functional() -> Any:
    # Without its optional `kernels` bitsandbytes warns on import; nothing of what it misses is used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        raise UserError(
            "base.quantize: nf4 needs bitsandbytes, which is not installed: pip install 'luthier[quantize]'."
        ) from None
    return functional
