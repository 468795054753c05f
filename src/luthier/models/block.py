"""A pre-norm decoder block with a gated MLP, and its gradient, as one function: Llama's, Mistral's and Qwen2's.

    n = norm1(x)    q, k = rotated Wq n, Wk n    v = Wv n    z = x + Wo attention(q, k, v)
    m = norm2(z)    y = z + Wd (silu(Wg m) * Wu m)

Kept for the backward pass: x, q, k, v, the attention's weights and output, z, Wg m and Wu m. The norms' outputs and the MLP's
inner product are computed again, by a pass or two over memory each, and only for tunings that read them. What lives within the
block only stands in memory that all blocks share, and what is kept in one allocation a block. Forward it rounds where
transformers' modules round, so that a tuning with a part that runs through these has the very bits of one that does not.
"""

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from luthier.models.attention import written_out_masks
from luthier.models.grafted import Grafted
from luthier.models.norms import is_rms_norm, norm_again, norm_backward, norm_forward, norm_weight_backward
from luthier.models.packing import Packing
from luthier.models.products import Product, hooked, plain
from luthier.models.rotary import rotate
from luthier.models.scratch import Scratch
from luthier.models.written_out import attend_backward, attend_forward, kept_size

_SAME = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"}

aten = torch.ops.aten


def quicken_blocks(model: nn.Module) -> None:
    """Let every such block of a model run as one function where it can; the modules stay who they are."""
    scratch = Scratch()
    for module in model.modules():
        if type(module).__name__ in _SAME and type(module.mlp.act_fn).__name__ == "SiLUActivation":  # type: ignore[union-attr]
            module._luthier_scratch = scratch  # type: ignore[assignment]
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    block = _pass(self, hidden_states, kwargs.get("packing"), kwargs.get("position_embeddings"))
    if block is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]

    def run(x: Tensor) -> Tensor:
        return _Block.apply(x, block, *block.trained)  # type: ignore[no-any-return]

    # transformers' forward looks at this; it is not the one that runs here.
    if self.gradient_checkpointing and self.training:
        return self._gradient_checkpointing_func(run, hidden_states)  # type: ignore[no-any-return]
    return run(hidden_states)


def _pass(block: Any, x: Tensor, packing: Packing | None, positions: Any) -> "_Pass | None":
    """This pass through a block; None where a part of it has a gradient that is not written out."""
    attention, mlp = block.self_attn, block.mlp
    norms = block.input_layernorm, block.post_attention_layernorm
    if packing is None or positions is None or x.shape[0] != 1 or not all(map(is_rms_norm, norms)):
        return None
    if isinstance(attention, Grafted) or isinstance(mlp, Grafted) or any(map(hooked, (attention, mlp, *norms))):
        return None
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    masks = written_out_masks(packing, window, x)
    if masks is None:
        return None
    modules = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    products = [_product(one) for one in (*modules, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    if not all(products):
        return None
    # Who does not train has no use for memory that stays.
    scratch = block._luthier_scratch if torch.is_grad_enabled() else Scratch()
    return _Pass(products, norms, packing, masks, positions, attention.head_dim, attention.scaling, scratch)  # type: ignore[arg-type]


def _product(module: nn.Module) -> Product | None:
    if not isinstance(module, Grafted):
        return plain(module)
    return None if hooked(module) else module.as_product()


class _Pass:
    """One pass forward and back through one block."""

    def __init__(
        self,
        products: Sequence[Product],
        norms: tuple[Any, Any],
        packing: Packing,
        masks: list[Tensor],
        positions: tuple[Tensor, Tensor],
        width: int,
        scale: float,
        scratch: Scratch,
    ):
        self.products, self.norms, self.packing, self.masks = products, norms, packing, masks
        self.width, self.scale, self.scratch = width, scale, scratch
        self.cos, self.sin = (one[0][:, None] for one in positions)  # (T, 1, d)
        weights = [norm.weight for norm in norms]
        self.trains_norms = [weight.requires_grad for weight in weights]
        own = [weight for weight, trained in zip(weights, self.trains_norms, strict=True) if trained]
        self.trained = (*own, *(one for product in products for one in product.trained))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor | None], list[int]]:
        """x: (T, D); the block's output, what the way back needs, and how much of that the attention and each product keeps."""
        query, key, value, output, gate, up, down = self.products
        heads, groups, width, inner = query.width, key.width, x.shape[1], gate.width
        per_token = heads, groups, groups, heads, width, inner, inner
        sizes = [kept_size(heads // self.width, self.packing.pieces), *(len(x) * one for one in per_token)]
        room, *flat = x.new_empty(sum(sizes)).split(sizes)
        q, k, v, mixed, z, g, u = (part.view(len(x), -1) for part in flat)

        n, first = norm_forward(x, *self._norm(0), self.scratch, self._take("n", x, width))
        by_query = query.forward(n, straight := self._take("straight", x, heads))
        self._turn(straight, self.sin, q)
        by_key = key.forward(n, straight := self._take("straight", x, groups))
        self._turn(straight, self.sin, k)
        by_value = value.forward(n, v)
        three, by_token = (self._heads(q), self._heads(k), self._heads(v)), self._by_token(mixed)
        weights = attend_forward(*three, self.packing.pieces, self.masks, self.scale, by_token, room, self.scratch)
        by_output = output.forward(mixed, change := self._take("change", x, width))
        torch.add(x, change, out=z)

        m, second = norm_forward(z, *self._norm(1), self.scratch, self._take("n", x, width))
        by_gate, by_up = gate.forward(m, g), up.forward(m, u)
        by_down = down.forward(self._gated(g, u), change)
        y = z + change
        kept = weights, by_query, by_key, by_value, by_output, by_gate, by_up, by_down
        return y, [x, q, k, v, mixed, z, g, u, first, second, *chain(*kept)], list(map(len, kept))

    def backward(
        self, upstream: Tensor, saved: Sequence[Any], counts: Sequence[int], wanted: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient of x, where it is wanted, and of `trained`; upstream: (T, D)."""
        x, q, k, v, mixed, z, g, u, first, second, *rest = saved
        stops = list(accumulate(counts, initial=0))
        weights, *kept = [rest[start:stop] for start, stop in pairwise(stops)]
        into_z, by_second, by_mlp = self._mlp_backward(upstream, z, g, u, second, kept[4:])

        output = self.products[3]
        into_mixed = self._take("into mixed", x, q.shape[1])
        by_output = output.backward(into_z, mixed, kept[3], into_mixed)
        into = [self._take(f"into {name}", x, one.shape[1]) for name, one in (("q", q), ("k", k), ("v", v))]
        three, into_three = (self._heads(q), self._heads(k), self._heads(v)), [self._heads(one) for one in into]
        pieces, gradients = self.packing.pieces, (into_three[0], into_three[1], into_three[2])
        by_token = self._by_token(into_mixed)
        attend_backward(by_token, *three, weights, pieces, self.masks, self.scale, gradients, self.scratch)
        into_q, into_k = self._take("straight", x, q.shape[1]), self._take("straight too", x, k.shape[1])
        back = -self.sin
        self._turn(into[0], back, into_q)
        self._turn(into[1], back, into_k)

        into_x, by_first, by_three = self._queries_backward((into_q, into_k, into[2]), x, first, kept[:3], wanted)
        if into_x is not None:
            into_x.add_(into_z)
        return into_x, [*by_first, *by_second, *by_three, *by_output, *by_mlp]

    def _mlp_backward(
        self, upstream: Tensor, z: Tensor, g: Tensor, u: Tensor, scale: Tensor, kept: Sequence[Any]
    ) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """The gradients of z, of the second norm and of the MLP's products."""
        gate, up, down = self.products[4:]
        into_g, into_u = self._take("into g", z, g.shape[1]), self._take("into u", z, g.shape[1])
        by_down = down.backward(upstream, self._gated(g, u) if down.reads else u, kept[2], into_g)
        torch.mul(into_g, aten.silu.out(g, out=into_u), out=into_u)
        aten.silu_backward.grad_input(into_g.mul_(u), g, grad_input=into_g)
        m = self._norm_again(1, z, scale) if gate.reads or up.reads else z
        into_m = self._take("into n", z, z.shape[1])
        by_gate = gate.backward(into_g, m, kept[0], into_m)
        by_up = up.backward(into_u, m, kept[1], into_m, add=True)
        given = into_m, z, scale, self._norm(1)[0], self.scratch
        by_norm = [norm_weight_backward(*given)] if self.trains_norms[1] else []
        return norm_backward(*given).add_(upstream), by_norm, [*by_gate, *by_up, *by_down]

    def _queries_backward(
        self, upstream: tuple[Tensor, Tensor, Tensor], x: Tensor, scale: Tensor, kept: Sequence[Any], wanted: bool
    ) -> tuple[Tensor | None, list[Tensor], list[Tensor | None]]:
        """The gradients of x, where it is wanted, of the first norm and of the products of queries, keys and values."""
        n = self._norm_again(0, x, scale) if any(one.reads for one in self.products[:3]) else x
        into_n = self._take("into n", x, x.shape[1]) if wanted or self.trains_norms[0] else None
        found: list[Tensor | None] = []
        for i, (one, gradient) in enumerate(zip(self.products[:3], upstream, strict=True)):
            found += one.backward(gradient, n, kept[i], into_n, add=i > 0)
        if into_n is None:
            return None, [], found
        given = into_n, x, scale, self._norm(0)[0], self.scratch
        by_norm = [norm_weight_backward(*given)] if self.trains_norms[0] else []
        return norm_backward(*given) if wanted else None, by_norm, found

    def _norm_again(self, which: int, x: Tensor, scale: Tensor) -> Tensor:
        return norm_again(x, scale, self._norm(which)[0], self.scratch, self._take("n", x, x.shape[1]))

    def _gated(self, g: Tensor, u: Tensor) -> Tensor:
        """silu(g) * u"""
        return aten.silu.out(g, out=self._take("inner", g, g.shape[1])).mul_(u)  # type: ignore[no-any-return]

    def _norm(self, which: int) -> tuple[Tensor, float]:
        return self.norms[which].weight, self.norms[which].variance_epsilon

    def _take(self, name: str, like: Tensor, width: int) -> Tensor:
        return self.scratch.take(name, (len(like), width), like)

    def _by_token(self, flat: Tensor) -> Tensor:
        """(T, H d) as (1, T, H, d)."""
        return flat.view(1, len(flat), -1, self.width)

    def _heads(self, flat: Tensor) -> Tensor:
        """(T, H d) as (1, H, T, d)."""
        return self._by_token(flat).transpose(1, 2)

    def _turn(self, flat: Tensor, sin: Tensor, out: Tensor) -> None:
        part = self.scratch.take("part", (len(flat), flat.shape[1] // self.width, self.width // 2), flat)
        rotate(self._by_token(flat)[0], self.cos, sin, self._by_token(out)[0], part)


class _Block(torch.autograd.Function):
    """x: (1, T, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: _Pass, *trained: Tensor) -> Tensor:
        y, saved, ctx.counts = block.forward(x[0])
        ctx.save_for_backward(*saved)
        ctx.block = block
        return y[None]

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        into_x, found = ctx.block.backward(outputs[0][0], ctx.saved_tensors, ctx.counts, ctx.needs_input_grad[0])
        return None if into_x is None else into_x[None], None, *found
