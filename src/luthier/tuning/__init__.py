"""One file per method. `METHODS` names them; everything generic reads the contract in `method.py`."""

from luthier.tuning.bottleneck import Bottleneck
from luthier.tuning.full import Full
from luthier.tuning.ia3 import IA3
from luthier.tuning.interpolation import Interpolation
from luthier.tuning.lora import LoRA
from luthier.tuning.method import Method, Prompting, attach, detach, parameters
from luthier.tuning.prefix_tuning import PrefixTuning
from luthier.tuning.prompt_tuning import PromptTuning
from luthier.tuning.prompting import BestTemplate, FewShot, ZeroShot
from luthier.tuning.selective import Selective

METHODS: dict[str, type[Method] | type[Prompting] | type[Interpolation]] = {
    "zero_shot": ZeroShot,
    "few_shot": FewShot,
    "best_template": BestTemplate,
    "full": Full,
    "selective": Selective,
    "lora": LoRA,
    "bottleneck": Bottleneck,
    "prompt_tuning": PromptTuning,
    "prefix_tuning": PrefixTuning,
    "ia3": IA3,
    "interpolate": Interpolation,
}

__all__ = [
    "IA3",
    "METHODS",
    "BestTemplate",
    "Bottleneck",
    "FewShot",
    "Full",
    "Interpolation",
    "LoRA",
    "Method",
    "PrefixTuning",
    "PromptTuning",
]
__all__ += ["Prompting", "Selective", "ZeroShot", "attach", "detach", "parameters"]
