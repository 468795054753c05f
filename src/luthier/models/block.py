"""A block as one function of autograd, its sublayers' gradients written out; the modules stay who they are."""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.models.grafted import Grafted, product_of
from luthier.models.norms import is_rms_norm
from luthier.models.products import Product, hooked
from luthier.models.scratch import Scratch
from luthier.models.sublayers import Kept, Sublayer, divided


def quicken_blocks(model: nn.Module, names: set[str], forward: Callable[..., Any], scratch: Scratch) -> None:
    """Let the blocks of these classes run `forward`, with memory that all of them share."""
    for module in model.modules():
        if type(module).__name__ in names:
            module._luthier_scratch = scratch  # type: ignore[assignment]
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def scratch_of(block: Any, tokens: int) -> Scratch:
    """Memory for a pass over so many tokens."""
    scratch: Scratch = block._luthier_scratch.lent()
    scratch.make_room(tokens)
    return scratch


def run_block(block: Any, sublayers: Sequence[Sublayer], x: Tensor) -> Tensor:
    """x: (1, T, D); its sublayers one after another, computed again on the way back where the block is checkpointed."""
    # transformers' forward looks at this; it is not the one that runs here.
    again = block.gradient_checkpointing and block.training
    for each in sublayers:  # computed again, what they keep is one block's at a time
        each.shares = again
    return _Block.apply(x, sublayers, again, *(one for each in sublayers for one in each.inputs))  # type: ignore[no-any-return]


def are_called(*modules: nn.Module) -> bool:
    """Whether modules that a block's function takes the place of have to be called: they have grafts or hooks."""
    return any(isinstance(one, Grafted) or hooked(one) for one in modules)


def are_norms(*modules: nn.Module) -> bool:
    """Whether they are norms with a gradient that is written out."""
    return all(is_rms_norm(one) and not hooked(one) for one in modules)


def products_of(*modules: nn.Module) -> list[Product] | None:
    """The linears of a sublayer, tuned or not; None where one has no gradient that is written out."""
    found = [product_of(one) for one in modules]
    return None if None in found else found  # type: ignore[return-value]


class _Block(torch.autograd.Function):
    """x: (1, T, D); `again`: x alone is kept, and what the sublayers keep is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sublayers: Sequence[Sublayer], again: bool, *inputs: Tensor) -> Tensor:
        saved, ctx.counts, y = [], [], x[0]
        if again:
            sublayers[0].scratch.expect((each.needs(y) for each in sublayers), y)
        try:
            for sublayer in sublayers:
                y, kept = sublayer.forward(y)
                saved += kept
                ctx.counts.append(len(kept))
        finally:
            sublayers[0].scratch.let_go()
        ctx.save_for_backward(*([x] if again else saved))
        ctx.sublayers, ctx.again = sublayers, again
        return y[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        try:
            kept = (
                _again(ctx.sublayers, ctx.saved_tensors[0][0])
                if ctx.again
                else divided(list(ctx.saved_tensors), ctx.counts)
            )
            return _gradients(ctx, kept, outputs[0][0])
        finally:
            ctx.sublayers[0].scratch.let_go()


def _gradients(ctx: Any, kept: list[Kept], upstream: Tensor | None) -> Any:
    """The gradients that autograd asks for, from the last sublayer to the first."""
    wanted = [ctx.needs_input_grad[0]]  # of each sublayer's x: where anything before has a gradient
    for sublayer in ctx.sublayers:
        wanted.append(wanted[-1] or bool(sublayer.inputs))
    found: list[Tensor | None] = []
    for sublayer, mine, asked in reversed(list(zip(ctx.sublayers, kept, wanted, strict=False))):
        if upstream is None:  # nothing before is trained
            found = [*(None for _ in sublayer.inputs), *found]
            continue
        upstream, by_inputs = sublayer.backward(upstream, mine, asked)
        found = [*by_inputs, *found]
        if ctx.again:
            sublayer.scratch.let_go(last=True)  # what it kept
    return None if upstream is None else upstream[None], None, None, *found


def _again(sublayers: Sequence[Sublayer], x: Tensor) -> list[Kept]:
    """What each keeps, once more; the last one's y is nobody's."""
    found = []
    for sublayer in sublayers[:-1]:
        x, kept = sublayer.forward(x)
        found.append(kept)
    return [*found, sublayers[-1].again(x)]
