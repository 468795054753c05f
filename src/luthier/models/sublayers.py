"""What blocks are made of, each a norm and what follows it, added to its input: y = x + f(norm(x)), forward and back by hand.

    attention   y = x + Wo attention(Wq n, Wk n, Wv n)    n = norm(x), queries and keys turned where positions are rotary;
                                                          across, keys and values are those of an encoder's states
    MLP         y = x + Wd (act(Wg n) * Wu n)             or, without a gate, x + Wd act(Wg n)

Kept for the way back: x, q, k, v, the attention's weights and output, Wg n and Wu n. The norms' outputs and the MLP's inner
product are computed again, by a pass or two over memory each, and only for tunings that read them. What is needed until a sublayer is
done stands in one room that all share; what a sublayer keeps stands in one allocation, or, where its block is computed again, in that
room too, where the gradient of Wu n then takes its place. Forward they round where transformers'
modules round, so that a tuning with a part that runs through these has the very bits of one that does not.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.models.activations import Activation
from luthier.models.attended import Attended, WayBack, new_into_bias
from luthier.models.kernels.calls import kernels_for
from luthier.models.norms import norm_again, norm_backward, norm_forward, norm_weight_backward
from luthier.models.products import Product
from luthier.models.rotary import rotate
from luthier.models.scratch import Scratch

# What a sublayer keeps, in an order of its own.
Kept = list[Tensor | None]
# Rows and columns.
Shapes = Sequence[tuple[int, int]]


class Sublayer(ABC):
    """One pass through a norm and what follows it; x is flat, (T, D).

    `others` are tensors besides x and weights that it reads. `inputs` are those of them and of the weights that have a
    gradient, in the order in which `backward` gives these.
    """

    def __init__(self, norm: Any, products: Sequence[Product], scratch: Scratch, others: Sequence[Tensor | None] = ()):
        self.products, self.scratch = products, scratch
        for product in products:
            product.scratch = scratch
        self.norm: tuple[Tensor, float] = norm.weight, norm.variance_epsilon
        self.trains_norm = norm.weight.requires_grad
        self.wants = [one is not None and one.requires_grad for one in others]
        given = [one for one, wanted in zip(others, self.wants, strict=True) if wanted and one is not None]
        own = [norm.weight] if self.trains_norm else []
        self.shares = False  # what is kept stands in shared memory, for one pass back: see `run_block`
        self.inputs = (*given, *own, *(one for product in products for one in product.trained))

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        """y and what `backward` needs. The y of a block's last sublayer is its own, not a part of what it keeps."""

    def again(self, x: Tensor) -> Kept:
        """What `forward` found that `backward` needs, once more."""
        return self.forward(x)[1]

    @abstractmethod
    def backward(self, upstream: Tensor, kept: Kept, wanted: bool) -> tuple[Tensor | None, Kept]:
        """The gradient of x, where it is wanted, and those of `inputs`."""

    def _normed(self, x: Tensor, out: Tensor) -> Tensor:
        """The norm's scale, its output into `out`."""
        return norm_forward(x, *self.norm, self.scratch, out)[1]

    def _normed_again(self, x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        """The norm's output; x, which nobody reads, where there is no place for it."""
        return norm_again(x, scale, self.norm[0], self.scratch, out) if out.numel() else x

    def _through_norm(
        self, into_n: Tensor | None, x: Tensor, scale: Tensor, upstream: Tensor, wanted: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradient of x, with what skips the sublayer, and of the norm's weight."""
        if into_n is None:
            return None, []
        given = into_n, x, scale, self.norm[0], self.scratch
        by_norm = [norm_weight_backward(*given)] if self.trains_norm else []
        return norm_backward(*given, skip=upstream) if wanted else None, by_norm

    def needs(self, x: Tensor) -> tuple[int, int]:
        """How many numbers it keeps, and how many it needs for a moment."""
        return _size(self._kept_shapes(x)), _size(self._back_shapes(x))

    @abstractmethod
    def _kept_shapes(self, x: Tensor) -> Shapes:
        """Of what is kept."""

    @abstractmethod
    def _back_shapes(self, x: Tensor) -> Shapes:
        """Of what the way back needs for a moment; the way there needs no more."""

    def _room(self, x: Tensor) -> list[Tensor]:
        """Tensors for what is kept, side by side."""
        shapes = self._kept_shapes(x)
        size = _size(shapes)
        return _divide(self.scratch.hold(size, x) if self.shares else x.new_empty(size), shapes)

    def _moments(self, like: Tensor, shapes: Shapes) -> list[Tensor]:
        """A tensor of each shape: memory until the sublayer is done."""
        return _divide(self.scratch.moment(_size(shapes), like), shapes)


class Attention(Sublayer):
    """Attention to the same tokens, or with `encoded`, (T', D), to those of an encoder.

    `products` are those of queries, keys, values and output; the masks of `attended` are corners of `bias` where that has a
    gradient; `rotary` are cosines and sines (T, 1, d); `width` is a head's d.
    """

    def __init__(
        self,
        norm: Any,
        products: Sequence[Product],
        scratch: Scratch,
        attended: Attended,
        width: int,
        rotary: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
        encoded: Tensor | None = None,
    ):
        super().__init__(norm, products, scratch, (bias, encoded))
        self.attended, self.width, self.rotary, self.bias, self.encoded = attended, width, rotary, bias, encoded

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        """Kept: x, what keys and values were made of, q, k, v, the mixed values, the norm's scale, the products', the weights."""
        query, key, value, output = self.products
        room, q, k, v, mixed, y = self._room(x)
        n = self._moments(x, [(len(x), x.shape[1])])[0]
        scale = self._normed(x, n)
        seen = n if self.encoded is None else self.encoded
        by_query, by_key, by_value = query.forward(n, q), key.forward(seen, k), value.forward(seen, v)
        self._turn(q, k)
        weights = self.attended.forward(self._three((q, k, v)), self._by_token(mixed), room[0], self.scratch)
        change = n  # in its place
        by_output = output.forward(mixed, change)
        torch.add(x, change, out=y)
        self.counts = [len(one) for one in (by_query, by_key, by_value, by_output)]
        return y, [x, self.encoded, q, k, v, mixed, scale, *by_query, *by_key, *by_value, *by_output, *weights]

    def backward(self, upstream: Tensor, kept: Kept, wanted: bool) -> tuple[Tensor | None, Kept]:
        """upstream: (T, D)."""
        x, encoded, q, k, v, mixed, scale, *rest = kept
        assert x is not None and q is not None and k is not None and v is not None
        assert mixed is not None and scale is not None
        query, key, value, output = self.products
        of_query, of_key, of_value, of_output, weights = divided(rest, self.counts)
        n, into_n, into_mixed, *into = self._moments(x, self._back_shapes(x))
        by_output = output.backward(upstream, mixed, of_output, into_mixed)  # type: ignore[arg-type]
        for one in into[1:]:  # what several pieces see is a sum
            one.zero_()
        into_bias = new_into_bias(self.bias) if self.bias is not None and self.wants[0] else None
        given = self._by_token(into_mixed), self._three((q, k, v)), self._by_token(mixed), weights, self._three(into)
        self.attended.backward(WayBack(*given, into_bias), self.scratch)
        into_q, into_k, into_v = into
        self._turn(into_q, into_k, back=True)

        n = self._normed_again(x, scale, n)
        asked = into_n if wanted or self.trains_norm else None
        by_query = query.backward(into_q, n, of_query, asked)
        seen, into_seen = (n, asked) if encoded is None else (encoded, None)
        if encoded is not None and self.wants[1]:
            into_seen = torch.empty_like(encoded)
        by_key = key.backward(into_k, seen, of_key, into_seen, add=encoded is None)
        by_value = value.backward(into_v, seen, of_value, into_seen, add=True)

        into_x, by_norm = self._through_norm(asked, x, scale, upstream, wanted)
        others = [None if into_bias is None or self.bias is None else into_bias.to(self.bias.dtype), into_seen]
        by_others = [one for one, asked in zip(others, self.wants, strict=True) if asked]
        return into_x, [*by_others, *by_norm, *by_query, *by_key, *by_value, *by_output]

    def _kept_shapes(self, x: Tensor) -> Shapes:
        """Of the attention's weights, q, k, v, the mixed values and y."""
        own, seen = len(x), len(x if self.encoded is None else self.encoded)
        wide, narrow = self.products[0].width, self.products[1].width
        of_weights = 1, self.attended.kept_size(wide // self.width)
        return [of_weights, (own, wide), (seen, narrow), (seen, narrow), (own, wide), (own, x.shape[1])]

    def _back_shapes(self, x: Tensor) -> Shapes:
        """Of n, where anybody reads it, and of the gradients of n, the mixed values, q, k and v."""
        own, seen = len(x), len(x if self.encoded is None else self.encoded)
        wide, narrow = self.products[0].width, self.products[1].width
        n = _if_read(x, self.products[:3] if self.encoded is None else self.products[:1])
        return [n, (own, x.shape[1]), (own, wide), (own, wide), (seen, narrow), (seen, narrow)]

    def _turn(self, *some: Tensor, back: bool = False) -> None:
        """Where positions are rotary, in their place."""
        if self.rotary is not None:
            for one in some:
                rotate(self._by_token(one)[0], *self.rotary, self.scratch, back)

    def _by_token(self, flat: Tensor) -> Tensor:
        """(T, H d) as (1, T, H, d)."""
        return flat.view(1, len(flat), -1, self.width)

    def _three(self, flat: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (T, H d) as (1, H, T, d)."""
        query, key, value = (self._by_token(one).transpose(1, 2) for one in flat)
        return query, key, value


class MLP(Sublayer):
    """`products` are those of the gate (or what stands in its place), of what it lets through, if anything, and down."""

    def __init__(
        self,
        norm: Any,
        gate: Product,
        up: Product | None,
        down: Product,
        activation: Activation,
        scratch: Scratch,
    ):
        super().__init__(norm, [one for one in (gate, up, down) if one is not None], scratch)
        self.gate, self.up, self.down, self.activation = gate, up, down, activation

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        """Kept: x, g = Wg n, u = Wu n, the norm's scale and the products'."""
        kept, change, inner = self._inside(x)
        by_down = self.down.forward(self._through(kept, inner), change)
        return x + change, [*kept, *by_down]

    def again(self, x: Tensor) -> Kept:
        """Without y."""
        kept, change, inner = self._inside(x)
        return [*kept, *self.down.again(self._through(kept, inner) if self.down.rereads else inner, change)]

    def _inside(self, x: Tensor) -> tuple[Kept, Tensor, Tensor]:
        """What is kept but for the last product's, where that may write (over the norm's output), and where what it takes may stand."""
        g, *rest = self._room(x)
        n, inner = self._moments(x, [(len(x), x.shape[1]), (len(x), g.shape[1])])
        scale = self._normed(x, n)
        by_gate = self.gate.forward(n, g)
        by_up = self.up.forward(n, rest[0]) if self.up else ()
        u = rest[0] if rest else None
        self.counts = [len(one) for one in (by_gate, by_up)]
        return [x, g, u, scale, *by_gate, *by_up], n, inner

    def _through(self, kept: Kept, out: Tensor) -> Tensor:
        """act(g) * u"""
        return self.activation.gate(kept[1], kept[2], out=out)  # type: ignore[arg-type]

    def backward(self, upstream: Tensor, kept: Kept, wanted: bool) -> tuple[Tensor | None, Kept]:
        """upstream: (T, D)."""
        x, g, u, scale, *rest = kept
        assert x is not None and g is not None and scale is not None
        of_gate, of_up, of_down = divided(rest, self.counts)
        n, into_n, into_g, apart, inner = self._moments(x, self._back_shapes(x))
        into_u = u if u is None or self._over(x) else apart
        passed = self.down.backward_input(upstream, of_down, into_g)
        self.activation.gate_backward(into_g, g, u, into_u, inner if self.down.reads else None)
        by_down = self.down.backward_weights(upstream, inner if self.down.reads else g, of_down, passed)

        n = self._normed_again(x, scale, n)
        asked = into_n if wanted or self.trains_norm else None
        by_gate = self.gate.backward(into_g, n, of_gate, asked)
        by_up = self.up.backward(into_u, n, of_up, asked, add=True) if self.up and into_u is not None else []
        into_x, by_norm = self._through_norm(asked, x, scale, upstream, wanted)
        return into_x, [*by_norm, *by_gate, *by_up, *by_down]

    def _kept_shapes(self, x: Tensor) -> Shapes:
        """Of g and u."""
        return [(len(x), self.gate.width)] * (1 if self.up is None else 2)

    def _back_shapes(self, x: Tensor) -> Shapes:
        """Of n, where anybody reads it, of the gradients of n, g and, if it has a place of its own, u, and of what the last product reads."""
        n = _if_read(x, self.products[:-1])
        apart, read = self.up is not None and not self._over(x), self.down.reads
        return [n, (len(x), x.shape[1]), *((len(x), self.gate.width * there) for there in (True, apart, read))]

    def _over(self, x: Tensor) -> bool:
        """Whether u's gradient takes its place: kernels read each number before they write there, and nobody reads it after them."""
        return self.shares and kernels_for(x) is not None


def _size(shapes: Shapes) -> int:
    return sum(rows * columns for rows, columns in shapes)


def _divide(flat: Tensor, shapes: Shapes) -> list[Tensor]:
    parts = flat.split([rows * columns for rows, columns in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _if_read(x: Tensor, readers: Sequence[Product]) -> tuple[int, int]:
    """The shape of a norm's output, of no columns where none of these reads it."""
    return len(x), x.shape[1] if any(one.reads for one in readers) else 0


def divided(some: Kept, counts: Sequence[int]) -> list[Any]:
    """Lists of so many, and of what is left."""
    found, start = [], 0
    for count in counts:
        found.append(some[start : start + count])
        start += count
    return [*found, some[start:]]
