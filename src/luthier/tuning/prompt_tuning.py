"""Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691).

    row = [p_1 ... p_P, embed(x_1) ... embed(x_T)]        p: (P, D), the only thing trained

The vectors stand before every row (for an encoder-decoder, before the encoder's input). They start as
the embeddings of a text, which converges where random vectors do not, of class labels or of random vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from luthier.errors import UserError
from luthier.models.base import BaseModel
from luthier.tuning import peft
from luthier.tuning.method import Defaults, Law, Laws, Method

INIT_TEXT = "Read the following text carefully, then answer briefly and exactly as in the examples seen before:"


@dataclass(frozen=True)
class PromptTuning(Method):
    """Train `length` vectors in front of every row.

    `init` is `text` (the embeddings of `init_text`, repeated to `length`), `class_labels` (each of `labels`, by default
    the task's answer choices, as the mean of its tokens' embeddings; then random vocabulary), `vocabulary` (embeddings
    of random tokens) or `random` (normal, with the spread of the embeddings).
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    defaults: ClassVar[Defaults] = Defaults(learning_rate=2e-2)
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    laws: ClassVar[Laws] = Laws(
        identity_at_start=Law(False, "it adds positions that attention sees, so a fresh one changes the output"),
        merge=Law(False, "it adds positions, which no weights of the base do"),
        mixed_batches=Law(True, "each row has its own prompt in front"),
    )

    method: Literal["prompt_tuning"] = "prompt_tuning"
    length: int = 20
    init: Literal["text", "class_labels", "vocabulary", "random"] = "text"
    init_text: str = INIT_TEXT
    labels: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length is {self.length}; it must be at least 1")

    def with_labels(self, choices: Sequence[str]) -> "PromptTuning":
        """With a task's answer choices for labels, where these are wanted and none are given."""
        wanted = self.init == "class_labels" and not self.labels
        return replace(self, labels=list(choices)) if wanted else self

    def attach(self, base: BaseModel, name: str, generator: torch.Generator) -> None:
        """Graft the vectors."""
        if self.length >= base.context:
            raise UserError(f"length: {self.length} virtual tokens do not fit a context of {base.context}.")
        with base.grafts.bare(), torch.no_grad():
            vectors = self._start(base, generator)
        base.grafts.graft_prompt(name, Parameter(vectors.float()))

    def _start(self, base: BaseModel, generator: torch.Generator) -> Tensor:
        embed = lambda ids: base.embedding(torch.tensor(ids, device=base.device)).float()  # noqa: E731
        drawn = vocabulary_ids(base, self.length, generator)
        if self.init == "text":
            return embed(text_ids(base, self.init_text, self.length))
        if self.init == "class_labels":
            if len(self.labels) > self.length:
                raise UserError(
                    f"init: class_labels has {len(self.labels)} labels for a length of {self.length}. Raise `length`."
                )
            means = [embed(text_ids(base, label)).mean(0) for label in self.labels]
            if not means:
                raise UserError("init: class_labels needs `labels`, or a task with answer choices.")
            return torch.cat([torch.stack(means), embed(drawn)])[: self.length]
        if self.init == "random":
            vectors = torch.randn(self.length, base.width, generator=generator)
            some = embed(vocabulary_ids(base, 1000, generator))
            return vectors.to(base.device) * some.std()
        return embed(drawn)

    def virtual_tokens(self) -> int:
        """The vectors take `length` positions."""
        return self.length

    def peft_config(self, base: BaseModel, name: str) -> dict[str, Any]:
        """A PEFT PromptTuningConfig."""
        return peft.header(base, self.peft_type) | {
            "num_virtual_tokens": self.length,
            "num_transformer_submodules": 2 if base.encoder_decoder else 1,
            "num_attention_heads": base.config.num_attention_heads,
            "num_layers": base.blocks,
            "token_dim": base.width,
            "prompt_tuning_init": "RANDOM",
        }

    @classmethod
    def from_peft(cls, base: BaseModel, config: Mapping[str, Any]) -> "PromptTuning":
        """The prompt that a PEFT PromptTuningConfig describes."""
        known = {"num_virtual_tokens", "num_transformer_submodules", "num_attention_heads", "num_layers", "token_dim"}
        known |= {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
        peft.refuse_others(config, known)
        return cls(length=config["num_virtual_tokens"], init="random")

    def to_file(self, base: BaseModel, name: str) -> dict[str, Tensor]:
        """PEFT's one tensor; for an encoder-decoder it holds the rows twice and reads the first half."""
        vectors = base.grafts.owned(name)["prompt_embeddings"]
        return {"prompt_embeddings": torch.cat([vectors, vectors]) if base.encoder_decoder else vectors}

    def from_file(self, base: BaseModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From PEFT's one tensor."""
        twice = 2 * self.length if base.encoder_decoder else self.length
        return {key: one[: self.length] if len(one) == twice else one for key, one in tensors.items()}


def text_ids(base: BaseModel, text: str, length: int | None = None) -> list[int]:
    """The token ids of a text, repeated or cut to `length`; raises UserError for a text without tokens."""
    ids: list[int] = base.tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise UserError(f"The text {text!r} has no tokens to start from; give another, or set `init: vocabulary`.")
    return ids if length is None else (ids * (length // len(ids) + 1))[:length]


def vocabulary_ids(base: BaseModel, count: int, generator: torch.Generator) -> list[int]:
    """Random token ids; the first few thousand pieces of a trained vocabulary are its most common ones."""
    top = min(base.embedding.weight.shape[0], 5000)
    ids: list[int] = torch.randint(top, (count,), generator=generator).tolist()
    return ids
