"""BaseModel: one frozen pre-trained model, decoder-only or encoder-decoder, behind one interface.

Everything that differs between architectures stands here and in `attention.py`: where embeddings and
head are, how logits are scaled, how rows are laid out. The head is applied at target positions only.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import UserError
from luthier.models import biased
from luthier.models.allocator import give_back_freed_memory, keep_freed_memory
from luthier.models.batch import Segment
from luthier.models.fast_paths import quicken
from luthier.models.grafted import Grafted, product_of
from luthier.models.grafts import Grafts
from luthier.models.load import (
    DEFAULT_CONTEXT,
    BaseSpec,
    context_length,
    read_model,
    read_skeleton,
    resolve_device,
    resolve_dtype,
)
from luthier.models.mapped import MappedFiles
from luthier.models.products import Product
from luthier.models.quantize import QuantizedLinear, adopt_packed, is_packed, quantize_linears
from luthier.models.where import kind_of

# Families whose rows may share one packed sequence; each passed the leakage test.
PACKED_FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma2"}


# Their states leave the decoder unscaled where the head is tied, and grow beyond float16's range.
T5_FAMILIES = {"t5", "mt5", "umt5", "longt5", "switch_transformers"}


class BaseModel:
    """A frozen model with its tokenizer and the tunings attached to it."""

    def __init__(self, model: Any, tokenizer: Any, spec: BaseSpec | None = None, device: torch.device | None = None):
        self.spec = spec or BaseSpec(model=getattr(model, "name_or_path", "") or "in-memory")
        # Of the weights as they were before quantization: a tuning fits either storage.
        self._fingerprint: str | None = None
        skeleton = model.get_input_embeddings().weight.is_meta
        if is_packed(model) and not skeleton:
            adopt_packed(model)
            self._fingerprint = _fingerprint(model, dict(model.named_parameters()))
        elif self.spec.quantize or is_packed(model):
            files = MappedFiles()
            self._fingerprint = None if skeleton else _fingerprint(model, dict(model.named_parameters()), files)
            quantize_linears(model, device or model.device, self.spec.double_quantize, files)
        if device is not None:
            model.to(device)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.config = model.config
        self.family: str = model.config.model_type
        self.encoder_decoder: bool = bool(model.config.is_encoder_decoder)
        self.packs = self.family in PACKED_FAMILIES
        self.scratch = quicken(model, self.packs)  # what blocks share
        self.grafts = Grafts(model)
        self.grafts.use(None)
        self.sharded = False  # divided over processes: see shard.py
        self.lends = False  # a tuning's copies may be the weights themselves: they are divided before any changes
        self.embedding_noise = 0.0  # NEFTune's alpha, while a tuning is trained
        self.methods: dict[str, Any] = {}  # tuning name -> the method that attached it

    @classmethod
    def load(cls, spec: BaseSpec, at: torch.device | None = None) -> "BaseModel":
        """Read a base model, onto `at` where its own device is not yet to hold it whole.

        Raises UserError where there is none by that name.
        """
        keep_freed_memory()
        device = resolve_device(spec.device)
        if device.type == "cuda" and device.index is not None:  # generators and memory are then that one's
            torch.cuda.set_device(device)
        dtype = resolve_dtype(spec.dtype, device)
        model, tokenizer = read_model(spec, dtype)
        if dtype == torch.float16 and model.config.model_type in T5_FAMILIES:
            raise UserError(f"{model.config.model_type.upper()} overflows in float16: use dtype bfloat16 or float32.")
        base = cls(model, tokenizer, spec, at or device)
        give_back_freed_memory()  # what reading and packing took
        return base

    @classmethod
    def skeleton(cls, spec: BaseSpec, dtype: torch.dtype | None = None) -> "BaseModel":
        """A base without weights, on which tunings can be tried on; raises UserError as `load` does."""
        resolve_device(spec.device)
        return cls(*read_skeleton(spec, dtype), spec)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision the model computes in."""
        return self.embedding.weight.dtype

    @property
    def embedding(self) -> nn.Embedding:
        """Token embeddings, (vocabulary, D); the encoder's where there is one."""
        return (self.model.get_encoder() if self.encoder_decoder else self.model).get_input_embeddings()

    @property
    def width(self) -> int:
        """D, the width of hidden states."""
        return self.embedding.weight.shape[1]

    @property
    def blocks(self) -> int:
        """Number of decoder blocks (with an encoder: of each stack)."""
        return int(self.config.num_hidden_layers)

    @property
    def context(self) -> int:
        """The longest row in tokens."""
        return context_length(self.config, DEFAULT_CONTEXT)

    @property
    def parameter_count(self) -> int:
        """Parameters of the bare base, a tied one counted once."""
        return sum(parameter.numel() for parameter in self.grafts.originals.values())

    @property
    def quantized(self) -> bool:
        """Whether any weight is kept in 4 bits."""
        return any(isinstance(module, QuantizedLinear) for module in self.grafts.modules.values())

    @property
    def forks(self) -> bool:
        """Whether rows that begin alike are best laid out as one row with branches: on a CPU, with nothing drawn row by row."""
        prefixed = self.grafts.name_of(0, ()) in self.grafts.prefixes
        return self.packs and self.on_cpu and not self.embedding_noise and not prefixed

    def packs_pairs(self, segments: tuple[Segment, ...] = ()) -> bool:
        """Whether the rows of an encoder-decoder run one after another in both stacks: on a CPU, through one tuning or none.

        An accelerator has fewer launches padded; of a divided base the bias is in a block whose weights are not whole outside.
        """
        if self.family not in biased.PACKED or not self.on_cpu or self.sharded or len(segments) > 1:
            return False
        return self.grafts.name_of(0, segments) not in self.grafts.prefixes

    @property
    def pads(self) -> bool:
        """Whether the rows of a batch run padded to the longest, through the tuning in use."""
        return not (self.packs or self.packs_pairs())

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on a CPU, or a dry run stands for that."""
        return kind_of(self.embedding.weight) == "cpu"

    @property
    def decoder_start(self) -> int:
        """The token an encoder-decoder's decoder begins with."""
        return int(self.config.decoder_start_token_id)

    def fingerprint(self) -> str:
        """16 hex digits of the architecture and of samples of every weight, the same in any precision and in 4 bits."""
        return self._fingerprint or _fingerprint(self.model, self.grafts.originals)

    def keep_fingerprint(self) -> None:
        """Remember the fingerprint: it can be taken of whole weights only."""
        self._fingerprint = self.fingerprint()

    def use(self, name: str | None, merged: bool = False) -> None:
        """Let the tuning `name` (None: the bare base) answer from here on.

        `merged` puts W + BA into memory beside W: no delta is computed, at the price of a copy of the tuned weights.
        The next `use` brings W back bit for bit. Raises UserError for a tuning that is in no weight.
        """
        self.grafts.use(name, merged)

    def logits(self, states: Tensor) -> Tensor:
        """Apply the head: (N, D) states to (N, vocabulary) logits, scaled and capped as the model does."""
        config = self.config
        if self._scales_states:
            states = states * config.d_model**-0.5
        logits: Tensor = self.model.get_output_embeddings()(states)
        if (bias := getattr(self.model, "final_logits_bias", None)) is not None:  # BART and its kin
            logits = logits + bias[0]
        if scale := getattr(config, "logit_scale", None):
            logits = logits * scale
        if scale := getattr(config, "logits_scaling", None):
            logits = logits / scale
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    def bare_head(self) -> Product | None:
        """The head, where logits are what it gives and nothing else, and its gradient is written out; else None."""
        config = self.config
        more = (getattr(config, key, None) for key in ("logit_scale", "logits_scaling", "final_logit_softcapping"))
        biased = getattr(self.model, "final_logits_bias", None) is not None
        if self.sharded or self._scales_states or biased or any(more):
            return None
        return product_of(self.model.get_output_embeddings())

    @property
    def _scales_states(self) -> bool:
        config = self.config
        return self.family in T5_FAMILIES and getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)

    def head_parameters(self) -> list[Tensor]:
        """The trainable tensors of the head, where the active tunings reach it."""
        head = self.model.get_output_embeddings()
        reached = head.active_parameters() if isinstance(head, Grafted) else head.parameters()
        return [parameter for parameter in reached if parameter.requires_grad]


def _fingerprint(model: Any, parameters: Mapping[str, Tensor], files: MappedFiles | None = None) -> str:
    """Of some numbers of each weight; the pages of `files` that were read for it are let go."""
    family, blocks = model.config.model_type, int(model.config.num_hidden_layers)
    width = model.get_input_embeddings().weight.shape[1]
    digest = hashlib.sha256(f"{family} {blocks} {width}".encode())
    packed = {f"{path}.weight": one for path, one in model.named_modules() if isinstance(one, QuantizedLinear)}
    for name, parameter in sorted(parameters.items()):
        flat = (packed[name].dequantized() if name in packed else parameter.detach()).flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16).float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
        if files:
            files.let_go(parameter)
    return digest.hexdigest()[:16]
