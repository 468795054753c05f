"""Prefix tuning (Li & Liang 2021, https://arxiv.org/abs/2101.00190).

    attention(q, [k_1 ... k_P, K], [v_1 ... v_P, V])       k, v: (layers, 2, K, P, d), the only thing trained

In every decoder layer P keys and values of the tuning's own stand before the row's. They start as those that the base
computes on a text, so a fresh one acts exactly as that text in the prompt. With `reparametrise` they are

    start + W_2 tanh(W_1 e + b_1) + b_2        e: (P, D), W_1: (hidden, D), W_2: (layers 2 K d, hidden), zero at first

while they are trained; what is saved is the sum. PEFT gives the layers i of an encoder-decoder the pair 2i mod layers,
so layers share pairs there; it is done so here too, because files agree only then.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from luthier.errors import UserError
from luthier.models.base import BaseModel
from luthier.models.observe import keys_and_values
from luthier.models.parts import attention_heads
from luthier.models.prefix import Prefix
from luthier.tuning import peft
from luthier.tuning.method import Defaults, Law, Laws, Method
from luthier.tuning.prompt_tuning import INIT_TEXT, text_ids, vocabulary_ids


class KeysValues(Prefix):
    """Keys and values as they are: (P, pairs 2 K d), spread over the layers that read each pair."""

    def __init__(self, start: Tensor, readers: list[int], heads: int):
        super().__init__()
        self.prompt_embeddings = Parameter(start)
        self.readers = readers  # for each layer, the pair it reads
        self.heads = heads

    def flat(self) -> Tensor:
        """(P, pairs 2 K d), fp32."""
        return self.prompt_embeddings

    def forward(self) -> Tensor:
        """(layers, 2, K, P, d)"""
        flat = self.flat()
        pairs = max(self.readers) + 1
        states = flat.view(len(flat), pairs, 2, self.heads, -1).permute(1, 2, 3, 0, 4)
        return states if self.readers == list(range(pairs)) else states[self.readers]


class Reparametrised(KeysValues):
    """Keys and values as a small network gives them, added to their start."""

    def __init__(self, start: Tensor, readers: list[int], heads: int, sizes: tuple[int, int], draw: torch.Generator):
        super().__init__(start, readers, heads)
        del self.prompt_embeddings
        self.register_buffer("start", start)
        width, hidden = sizes
        self.embedding = Parameter(torch.randn(len(start), width, generator=draw))
        first, last = nn.Linear(width, hidden), nn.Linear(hidden, start.shape[1])
        nn.init.normal_(first.weight, std=width**-0.5, generator=draw)
        for zero in (first.bias, last.weight, last.bias):
            nn.init.zeros_(zero)
        self.transform = nn.Sequential(first, nn.Tanh(), last)

    def flat(self) -> Tensor:
        """(P, pairs 2 K d), fp32."""
        start: Tensor = self.start  # type: ignore[assignment]
        return start + self.transform(self.embedding)


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Train `length` keys and values in front of every row, in every decoder layer.

    `init` is `text` (what the base computes on `init_text`, repeated to `length`), `vocabulary` (on random tokens) or
    `random` (normal, with the spread of what it computes). `reparametrise` trains them through a network with `hidden`
    inner units.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    defaults: ClassVar[Defaults] = Defaults(learning_rate=1e-2)
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    laws: ClassVar[Laws] = Laws(
        identity_at_start=Law(False, "it adds positions that attention sees, so a fresh one changes the output"),
        merge=Law(False, "it adds positions, which no weights of the base do"),
        mixed_batches=Law(True, "each row attends to its own prefix"),
    )

    method: Literal["prefix_tuning"] = "prefix_tuning"
    length: int = 20
    init: Literal["text", "vocabulary", "random"] = "text"
    init_text: str = INIT_TEXT
    reparametrise: bool = False
    hidden: int = 512

    def __post_init__(self) -> None:
        for key in ("length", "hidden"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")

    def attach(self, base: BaseModel, name: str, generator: torch.Generator) -> None:
        """Graft the prefix."""
        if self.length >= base.context:
            raise UserError(f"length: {self.length} virtual tokens do not fit a context of {base.context}.")
        ids = text_ids(base, self.init_text, self.length) if self.init == "text" else []
        observed = keys_and_values(base, ids or vocabulary_ids(base, self.length, generator))
        if self.init == "random":
            drawn = torch.randn(observed.shape, generator=generator).to(observed.device)
            observed = drawn * observed.std(dim=(2, 3, 4), keepdim=True)
        kept, readers = _pairs(base)
        first = [readers.index(pair) for pair in range(len(kept))]
        start = observed[first].permute(3, 0, 1, 2, 4).reshape(self.length, -1).contiguous()
        heads = observed.shape[2]
        prefix: Prefix
        if self.reparametrise:
            prefix = Reparametrised(start, readers, heads, (base.width, self.hidden), generator)
        else:
            prefix = KeysValues(start, readers, heads)
        base.grafts.graft_prefix(name, prefix.to(base.device))

    def virtual_tokens(self) -> int:
        """The prefix takes `length` positions."""
        return self.length

    def saved(self) -> "PrefixTuning":
        """Without the network, which only training needs."""
        return PrefixTuning(length=self.length, init="random")

    def peft_config(self, base: BaseModel, name: str) -> dict[str, Any]:
        """A PEFT PrefixTuningConfig."""
        layers, heads, width = attention_heads(base)
        return peft.header(base, self.peft_type) | {
            "num_virtual_tokens": self.length,
            "num_transformer_submodules": 2 if base.encoder_decoder else 1,
            "num_attention_heads": heads,
            "num_layers": layers,
            "token_dim": heads * width,
            "encoder_hidden_size": heads * width,
            "prefix_projection": False,
        }

    @classmethod
    def from_peft(cls, base: BaseModel, config: Mapping[str, Any]) -> "PrefixTuning":
        """The prefix that a PEFT PrefixTuningConfig describes; its network, if any, is not in the file."""
        known = {"num_virtual_tokens", "num_transformer_submodules", "num_attention_heads", "num_layers", "token_dim"}
        peft.refuse_others(config, known | {"encoder_hidden_size", "prefix_projection", "init_weights"})
        layers, heads, width = attention_heads(base)
        theirs = [config.get(key) for key in ("num_layers", "num_attention_heads", "token_dim")]
        if theirs != [layers, heads, heads * width]:
            raise UserError(
                f"its prefix has (layers, heads, width) {tuple(theirs)}; this base has {(layers, heads, heads * width)}."
            )
        return cls(length=config["num_virtual_tokens"], init="random")

    def to_file(self, base: BaseModel, name: str) -> dict[str, Tensor]:
        """PEFT's one tensor, (P, layers 2 K d); pairs that no layer reads are zero."""
        prefix = base.grafts.prefixes[name]
        assert isinstance(prefix, KeysValues)
        kept, _ = _pairs(base)
        flat = prefix.flat().detach().view(self.length, len(kept), -1)
        whole = flat.new_zeros(self.length, attention_heads(base)[0], flat.shape[2])
        whole[:, kept] = flat
        return {"prompt_embeddings": whole.flatten(1)}

    def from_file(self, base: BaseModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From PEFT's one tensor."""
        layers, heads, width = attention_heads(base)
        kept, _ = _pairs(base)
        fits = (self.length, layers * 2 * heads * width)
        return {
            key: one.view(self.length, layers, -1)[:, kept].flatten(1) if one.shape == fits else one
            for key, one in tensors.items()
        }


def _pairs(base: BaseModel) -> tuple[list[int], list[int]]:
    """The pairs of PEFT's tensor that some layer reads; and for each layer, which of these it reads."""
    layers = attention_heads(base)[0]
    read = [2 * layer % layers if base.encoder_decoder else layer for layer in range(layers)]
    kept = sorted(set(read))
    return kept, [kept.index(one) for one in read]
