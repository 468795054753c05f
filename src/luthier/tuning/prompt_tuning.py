"""Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691).

    row = [p_1 ... p_P, embed(x_1) ... embed(x_T)]        p: (P, D), the only thing trained

The vectors stand before every row (for an encoder-decoder, before the encoder's input). They start as
the embeddings of a text, which converges where random vectors do not, or of random vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from luthier.errors import UserError
from luthier.models.base import BaseModel
from luthier.tuning.method import Defaults


@dataclass(frozen=True)
class PromptTuning:
    """Train `length` vectors in front of every row.

    `init` is `text` (the embeddings of `init_text`, repeated to `length`), `vocabulary` (embeddings of
    random tokens) or `random` (normal, with the spread of the embedding table).
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    defaults: ClassVar[Defaults] = Defaults(learning_rate=2e-2)

    method: Literal["prompt_tuning"] = "prompt_tuning"
    length: int = 20
    init: Literal["text", "vocabulary", "random"] = "text"
    init_text: str = (
        "Read the following text carefully, then answer briefly and exactly as in the examples seen before:"
    )

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length is {self.length}; it must be at least 1")

    def attach(self, base: BaseModel, name: str, generator: torch.Generator) -> None:
        """Graft the vectors."""
        if self.length >= base.context:
            raise UserError(f"length: {self.length} virtual tokens do not fit a context of {base.context}.")
        table = base.embedding.weight.detach()
        if self.init == "random":
            drawn = torch.randn(self.length, base.width, generator=generator)
            vectors = drawn.to(base.device) * table.float().std()
        else:
            vectors = table[self._first_ids(base, table.shape[0], generator)].float()
        base.grafts.graft_prompt(name, Parameter(vectors))

    def _first_ids(self, base: BaseModel, vocabulary: int, generator: torch.Generator) -> Tensor:
        if self.init == "vocabulary":
            # The first few thousand pieces of a trained vocabulary are its most common ones.
            drawn = torch.randint(min(vocabulary, 5000), (self.length,), generator=generator)
            return drawn.to(base.device)
        ids = base.tokenizer(self.init_text, add_special_tokens=False).input_ids
        if not ids:
            raise UserError(f"init_text {self.init_text!r} has no tokens; give a text or set `init: vocabulary`.")
        repeated = (ids * (self.length // len(ids) + 1))[: self.length]
        return torch.tensor(repeated, device=base.device)

    def virtual_tokens(self) -> int:
        """The vectors take `length` positions."""
        return self.length

    def peft_config(self, base: BaseModel, name: str) -> dict[str, Any]:
        """A PEFT PromptTuningConfig."""
        return {
            "peft_type": "PROMPT_TUNING",
            "task_type": "SEQ_2_SEQ_LM" if base.encoder_decoder else "CAUSAL_LM",
            "base_model_name_or_path": base.spec.model,
            "num_virtual_tokens": self.length,
            "num_transformer_submodules": 2 if base.encoder_decoder else 1,
            "num_attention_heads": base.config.num_attention_heads,
            "num_layers": base.blocks,
            "token_dim": base.width,
            "prompt_tuning_init": "RANDOM",
            "inference_mode": True,
        }

    def to_file(self, base: BaseModel, owned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's one tensor; for an encoder-decoder it holds the rows twice and reads the first half."""
        vectors = owned["prompt_embeddings"]
        return {"prompt_embeddings": torch.cat([vectors, vectors]) if base.encoder_decoder else vectors}

    def from_file(self, base: BaseModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From PEFT's one tensor."""
        return {key: tensor[: self.length] for key, tensor in tensors.items()}
