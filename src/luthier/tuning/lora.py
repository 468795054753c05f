"""LoRA: low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    y = W x + s B A x        A: (r, in), B: (out, r), s = alpha / r

A starts Kaiming-uniform and B at zero, so a fresh LoRA changes nothing. Only A and B are trained:
r (in + out) numbers for each target of in x out. rsLoRA (https://arxiv.org/abs/2312.03732) scales by
s = alpha / sqrt(r); DoRA is in `dora.py`, LoRA on an embedding in `lora_embedding.py`.

    q_proj: Linear   ->   q_proj: Grafted(base=Linear, deltas={name: LowRank(A, B)})
"""

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.errors import UserError
from luthier.models.base import BaseModel
from luthier.models.grafted import Delta
from luthier.models.parts import embeddings
from luthier.tuning import peft
from luthier.tuning.copies import all_places, copies_of_modules, interpolate_copies, paths_of_modules
from luthier.tuning.dora import DoRA, DoRAEmbedding
from luthier.tuning.lora_embedding import LowRankEmbedding
from luthier.tuning.low_rank import LowRank, features
from luthier.tuning.method import Defaults, Law, Laws, Method
from luthier.tuning.targets import LINEAR, match_modules

# PEFT's ways to start that leave the base's weights as they are; others (pissa, loftq ...) change them.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class LoRA(Method):
    """Train a product of two thin matrices beside each target.

    `targets` is `all-linear` (every linear but the output head), `attention`, `embeddings`, a shell pattern, a
    regular expression over whole module paths, the end of a path (`q_proj`), or a list of these; `layers` keeps the
    targets in these blocks only (-1 is the last). The product is scaled by alpha / rank, with `rslora` by
    alpha / sqrt(rank). `rank_pattern` and `alpha_pattern` give other values to modules whose path ends so.
    `dora` trains each output's magnitude apart from its direction. `modules_to_save` names modules that are trained
    whole beside; one tied to another needs `untie`.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    defaults: ClassVar[Defaults] = Defaults(learning_rate=1e-3)
    peft_type: ClassVar[str] = "LORA"

    method: Literal["lora"] = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    layers: list[int] | None = None
    rslora: bool = False
    dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)
    untie: bool = False

    def __post_init__(self) -> None:
        for where, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if rank < 1:
                raise ValueError(f"{where} is {rank}; it must be at least 1")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from None
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")

    @property
    def laws(self) -> Laws:
        """Which laws hold."""
        mixes = Law(True, "it adds to the outputs of its own rows only")
        if self.modules_to_save:
            mixes = Law(False, "modules_to_save replaces whole weights, for every row of a batch")
        return Laws(Law(True, "B is zero"), Law(True, "W + s B A is a matrix of W's shape"), mixes)

    def attach(self, base: BaseModel, name: str, generator: torch.Generator) -> None:
        """Graft a low-rank delta on every target."""
        targets = self._targets(base)
        for one in (*self.rank_pattern, *self.alpha_pattern):
            if not any(_ends(path, one) for path in targets):
                raise UserError(f"The rank or alpha pattern {one!r} matches none of the {len(targets)} targets.")
        shared = _shared(base, targets)
        for path, module in targets.items():
            rank, alpha = _pick(self.rank_pattern, path, self.rank), _pick(self.alpha_pattern, path, self.alpha)
            drawn = (rank, alpha / (math.sqrt(rank) if self.rslora else rank), self.dropout, generator)
            where = base.device
            delta: Delta
            if isinstance(module, nn.Embedding):
                delta = DoRAEmbedding(module, *drawn, where) if self.dora else LowRankEmbedding(module, *drawn)
            else:
                delta = DoRA(module, *drawn, where) if self.dora else LowRank(features(module), *drawn)
            base.grafts.graft_module(path, name, delta.to(where), shared=path in shared)
        if self.modules_to_save:
            base.grafts.substitute(name, *copies_of_modules(base, self.modules_to_save, self.untie))

    def _targets(self, base: BaseModel) -> dict[str, nn.Module]:
        found = match_modules(base, self.targets, (*LINEAR, nn.Embedding), self.layers)
        # As in PEFT, what is trained whole has no product beside it.
        whole = tuple(f"{path}." for path in paths_of_modules(base, self.modules_to_save))
        left = {path: module for path, module in found.items() if not f"{path}.".startswith(whole)}
        if not left:
            raise UserError("Every target is among modules_to_save, so LoRA has nothing to stand beside.")
        return left

    def toward_base(self, base: BaseModel, name: str, share: float) -> None:
        """Multiply B, and interpolate what is trained whole. DoRA's magnitudes leave no such line to the base."""
        if self.dora:
            raise UserError(
                "DoRA rescales rows of W + BA, so no share of its change is a DoRA. Interpolate a plain lora."
            )
        with torch.no_grad():
            for _, delta in base.grafts.deltas(name).values():
                if isinstance(delta, LowRank):
                    delta.lora_B.weight.mul_(share)
                elif isinstance(delta, LowRankEmbedding):
                    delta.lora_embedding_B.mul_(share)
        interpolate_copies(base, name, share)

    def peft_config(self, base: BaseModel, name: str) -> dict[str, Any]:
        """A PEFT LoraConfig."""
        targets = self._targets(base)
        return peft.header(base, self.peft_type) | {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": sorted(targets),
            "fan_in_fan_out": any(isinstance(module, Conv1D) for module in targets.values()),
            "bias": "none",
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "modules_to_save": paths_of_modules(base, self.modules_to_save) or None,
        }

    @classmethod
    def from_peft(cls, base: BaseModel, config: Mapping[str, Any]) -> "LoRA":
        """The LoRA that a PEFT LoraConfig describes; raises UserError for what it cannot be."""
        starts = config.get("init_lora_weights", True)
        if starts not in _PLAIN_STARTS:
            raise UserError(f"init_lora_weights {starts!r} changed the base's own weights, which are not in the file.")
        known = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"}
        known |= {"layers_pattern", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"}
        known |= {"init_lora_weights", "loftq_config", "eva_config"} | (
            {"bias"} if config.get("bias") == "none" else set()
        )
        peft.refuse_others(config, known)
        targets = peft.chosen_modules(base, config, (*LINEAR, nn.Embedding))
        ends = tuple(config.get("modules_to_save") or ())
        whole = [path for path in base.grafts.modules if path.endswith(ends)]  # PEFT does not look for a dot
        targets = [path for path in targets if not any(re.match(rf"(^|.*\.){one}($|\..*)", path) for one in ends)]

        def met(key: str) -> dict[str, Any]:  # PEFT lets patterns be that no target meets
            given = config.get(key) or {}
            return {one: value for one, value in given.items() if any(_ends(path, one) for path in targets)}

        return cls(
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            targets=targets,
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            modules_to_save=whole,
            untie=bool(whole),
            rank_pattern=met("rank_pattern"),
            alpha_pattern=met("alpha_pattern"),
        )

    def to_file(self, base: BaseModel, name: str) -> dict[str, Tensor]:
        """PEFT's keys."""
        return {peft.PREFIX + key: tensor for key, tensor in base.grafts.owned(name).items()}

    def from_file(self, base: BaseModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From PEFT's keys; the base's embeddings, which PEFT may add, are left out where they are this base's."""
        found, places = {}, all_places(base)
        for key, tensor in tensors.items():
            own = key.removeprefix(peft.PREFIX)
            theirs = base.grafts.originals.get(places.get(own.replace(".base_layer.", "."), ""))
            if ".base_layer." in own and theirs is not None and torch.equal(tensor.to(theirs), theirs):
                continue
            found[own] = tensor
        return found


def _shared(base: BaseModel, targets: Mapping[str, nn.Module]) -> set[str]:
    """The targets that are embeddings, but not of tokens."""
    found = {path for path, module in targets.items() if isinstance(module, nn.Embedding)} - embeddings(base).keys()
    for path in found:
        if len(inspect.signature(targets[path].forward).parameters) > 1:
            raise UserError(f"{path} reads more than the numbers it looks up, so LoRA cannot stand beside it.")
    return found


def _ends(path: str, pattern: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _pick(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that a path ends with, as in PEFT."""
    return next((value for one, value in patterns.items() if _ends(path, one)), default)
