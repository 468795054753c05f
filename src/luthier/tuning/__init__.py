"""One file per method. `METHODS` names them; everything generic reads the contract in `method.py`."""

from luthier.tuning.full import Full
from luthier.tuning.lora import LoRA
from luthier.tuning.method import Method, Prompting, attach, detach, parameters
from luthier.tuning.prompt_tuning import PromptTuning
from luthier.tuning.prompting import FewShot, ZeroShot

METHODS: dict[str, type[Method] | type[Prompting]] = {
    "zero_shot": ZeroShot,
    "few_shot": FewShot,
    "full": Full,
    "lora": LoRA,
    "prompt_tuning": PromptTuning,
}

__all__ = ["METHODS", "FewShot", "Full", "LoRA", "Method", "PromptTuning", "Prompting", "ZeroShot"]
__all__ += ["attach", "detach", "parameters"]
