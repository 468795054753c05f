"""Where the parts that methods graft on stand in a model: blocks, attention, MLP, norms, embeddings, head."""

import fnmatch
from dataclasses import dataclass

from torch import nn

from luthier.errors import UserError
from luthier.models.base import BaseModel


@dataclass(frozen=True)
class Layout:
    """Shell patterns over module paths; `mlp` is empty where the MLP is no module of its own."""

    attention_output: str
    mlp_output: str
    mlp: str
    keys_values: tuple[str, ...]  # GPT-2 and others compute queries, keys and values in one linear


# The first layout of which every pattern matches is the model's.
LAYOUTS = (
    Layout("*.self_attn.o_proj", "*.mlp.down_proj", "*.mlp", ("*.self_attn.k_proj", "*.self_attn.v_proj")),  # Llama
    Layout("*.attn.c_proj", "*.mlp.c_proj", "*.mlp", ("*.attn.c_attn",)),  # GPT-2
    Layout("*Attention.o", "*.DenseReluDense.wo", "*.DenseReluDense", ("*Attention.k", "*Attention.v")),  # T5
    Layout("*attn.out_proj", "*.fc2", "", ("*attn.k_proj", "*attn.v_proj")),  # OPT, BART
    Layout("*.self_attn.dense", "*.mlp.fc2", "*.mlp", ("*.self_attn.k_proj", "*.self_attn.v_proj")),  # Phi
    Layout("*.attention.dense", "*.mlp.dense_4h_to_h", "*.mlp", ("*.attention.query_key_value",)),  # GPT-NeoX
    Layout("*.self_attention.dense", "*.mlp.dense_4h_to_h", "*.mlp", ("*.self_attention.query_key_value",)),  # Falcon
)


def layout(base: BaseModel) -> Layout:
    """The layout of a base; raises UserError where it is none of those known."""
    for one in LAYOUTS:
        if all(matching(base, pattern) for pattern in (one.attention_output, one.mlp_output, *one.keys_values)):
            return one
    endings = sorted({path.rpartition(".")[2] for path, module in base.grafts.modules.items() if _is_linear(module)})
    raise UserError(
        f"Where attention and MLP stand in a {base.family} model is not known here; name the modules in `targets`. "
        f"Its linear modules end in: {', '.join(endings)}."
    )


def matching(base: BaseModel, pattern: str) -> dict[str, nn.Module]:
    """The modules, by path, that a shell pattern matches."""
    return {path: module for path, module in base.grafts.modules.items() if fnmatch.fnmatchcase(path, pattern)}


def block_of(base: BaseModel, path: str) -> tuple[int, int] | None:
    """(block, blocks of its stack) for a path inside a block, else None."""
    for stack, module in base.grafts.modules.items():
        if isinstance(module, nn.ModuleList) and path.startswith(f"{stack}."):  # the outermost comes first
            return int(path[len(stack) + 1 :].partition(".")[0]), len(module)
    return None


def norms(base: BaseModel) -> dict[str, nn.Module]:
    """LayerNorms and RMSNorms, by path."""
    return {path: module for path, module in base.grafts.modules.items() if type(module).__name__.endswith("Norm")}


def embeddings(base: BaseModel) -> dict[str, nn.Module]:
    """The token embeddings that a forward pass runs, by path: an encoder-decoder has two, usually tied."""
    owners = [base.model.get_encoder(), base.model.get_decoder()] if base.encoder_decoder else [base.model]
    return _paths_of(base, [owner.get_input_embeddings() for owner in owners])


def head(base: BaseModel) -> dict[str, nn.Module]:
    """The output head, by path."""
    return _paths_of(base, [base.model.get_output_embeddings()])


def attention_heads(base: BaseModel) -> tuple[int, int, int]:
    """(decoder layers, key/value heads, width of a head)."""
    config = base.config
    layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return int(layers), int(heads), int(width or config.hidden_size // config.num_attention_heads)


def _paths_of(base: BaseModel, modules: list[nn.Module]) -> dict[str, nn.Module]:
    wanted = {id(getattr(module, "base", module)) for module in modules}
    return {path: module for path, module in base.grafts.modules.items() if id(module) in wanted}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
