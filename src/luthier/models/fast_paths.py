"""What of a model runs as Luthier's own code; everything else is transformers'."""

from typing import Any

from luthier.models import attention, biased
from luthier.models.activations import quicken_activations
from luthier.models.families.llama import quicken_llama
from luthier.models.families.t5 import quicken_t5
from luthier.models.norms import quicken_norms
from luthier.models.products import quicken_linears
from luthier.models.scratch import Scratch


def quicken(model: Any, packs: bool) -> Scratch:
    """Choose a model's attention (packed rows, T5's bias, or transformers' own), and quicken its linears, norms, activations and blocks.

    Returns the memory that the blocks share.
    """
    name = attention.NAME if packs else biased.NAME if model.config.model_type in biased.FAMILIES else "eager"
    model.set_attn_implementation(name)
    quicken_linears(model)
    quicken_norms(model)
    quicken_activations(model)
    scratch = Scratch()
    quicken_llama(model, scratch)
    quicken_t5(model, scratch)
    return scratch
