"""The jobs: our method, the peers' configuration, and the rows and models that all sides share."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Rows of an optimizer step, for everybody.
BATCH, SEED = 8, 0
HELD_OUT = 20
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
# flan-t5-small's shape; without dropout, so that all sides compute the same function.
T5_SMALL = {
    "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_decoder_layers": 8, "num_heads": 6,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip
T5_FIRST_WORD, T5_END = 3, 1

# Their own start is noise; this one changes nothing at first, as ours.
FROM_NOTHING = {"init_weights": "mam_adapter"}
ADAPTERS = (
    "`adapters` 1.3.0 asks for transformers 4.57 (~=4.57.6), which cannot stand beside transformers 5: it runs in an "
    "environment of its own, whose Python --adapters-python names; without it Luthier runs alone"
)


@dataclass(frozen=True)
class Job:
    """One row of the comparison. `peft` is PEFT's class and its settings, None for full fine-tuning; `adapters` a class of theirs and its."""

    ours: dict[str, Any]
    rate: float
    peers: tuple[str, ...]
    peft: tuple[str, dict[str, Any]] | None = None
    adapters: tuple[str, dict[str, Any]] | None = None
    t5: bool = False
    quantize: bool = False
    note: str = ""


JOBS: dict[str, Job] = {
    "lora": Job(
        {"method": "lora", "rank": 8, "alpha": 16}, 1e-3, ("trainer", "trl"),
        ("LoraConfig", {"r": 8, "lora_alpha": 16, "target_modules": LINEARS}),
    ),
    "qlora": Job(
        {"method": "lora", "rank": 8, "alpha": 16}, 1e-3, ("trainer", "trl"),
        ("LoraConfig", {"r": 8, "lora_alpha": 16, "target_modules": LINEARS}), quantize=True,
        note="the base in nf4 with double quantization by bitsandbytes, on every side",
    ),
    "prompt_tuning": Job(
        {"method": "prompt_tuning", "length": 20}, 2e-2, ("trainer",),
        ("PromptTuningConfig", {"num_virtual_tokens": 20, "prompt_tuning_init": "TEXT"}),
        note="both sides start from the embeddings of Luthier's text; PEFT's default is a random one",
    ),
    "ia3": Job(
        {"method": "ia3"}, 1e-2, ("trainer",),
        ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    ),
    "norms": Job(
        {"method": "selective", "targets": "layernorm"}, 2e-3, ("trainer",), ("LNTuningConfig", {"target_modules": NORMS}),
    ),
    "bottleneck_pfeiffer": Job(
        {"method": "bottleneck", "placement": "pfeiffer"}, 1e-3, ("adapters",), adapters=("SeqBnConfig", FROM_NOTHING), note=ADAPTERS
    ),
    "bottleneck_houlsby": Job(
        {"method": "bottleneck", "placement": "houlsby"}, 1e-3, ("adapters",), adapters=("DoubleSeqBnConfig", FROM_NOTHING), note=ADAPTERS
    ),
    "full": Job(
        {"method": "full"}, 5e-5, ("trainer", "masters"),
        note="Luthier keeps fp32 masters of 16-bit weights. `masters` is the same work: the Trainer on fp32 weights with "
        "bf16=True (autocast). `trainer` is less: weights, gradients and AdamW in bfloat16. In float32 they are one",
    ),
    "t5": Job(
        {"method": "lora", "rank": 8, "alpha": 16, "targets": ["q", "v"]}, 1e-3, ("seq2seq",),
        ("LoraConfig", {"r": 8, "lora_alpha": 16, "target_modules": ["q", "v"]}), t5=True,
        note="random weights of flan-t5-small's shape; the rows' ids folded into its vocabulary",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Token ids of one row."""

    prompt: list[int]
    target: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


def write_rows(path: Path, model: str, data: Path | None, count: int, t5: bool) -> int:
    """Encode training rows, in the order in which Luthier takes them, and held-out rows; return the training tokens."""
    from luthier.data.source import Source
    from luthier.data.task import Task
    from luthier.encoding.order import Shuffled
    from luthier.recipe_file import make_recipe

    recipe = make_recipe(
        {"base": {"model": model}, "task": "support-dialogues", "tunings": ["zero_shot"], "retention": []}
    )
    task = recipe.task
    if data is not None:
        task = Task(
            template="Summarize the following conversation.\n\n{{ dialogue }} ||| {{ summary }}",
            train=Source(str(data / "dialogsum.dev.jsonl"), limit=count + HELD_OUT), validation=HELD_OUT, test=0,
        )  # fmt: skip
    examples = recipe.examples(task)  # type: ignore[arg-type]
    encoder = recipe.read_encoder()
    training = [encoder.encode(one) for one in list(examples.train)[:count]]
    held = [encoder.encode(one) for one in list(examples.validation)[:HELD_OUT]]
    if len(training) < count:
        raise SystemExit(f"--rows {count}: there are {len(training)} training rows here.")
    order = Shuffled(training, SEED)
    made = {
        "training": [(row.prompt, row.target) for row in (order.at(k) for k in range(len(training)))],
        "held": [(row.prompt, row.target) for row in held],
    }
    if t5:
        made = {key: [(folded(one), folded(two)) for one, two in rows] for key, rows in made.items()}
    path.write_text(json.dumps(made))
    return sum(len(prompt) + len(target) for prompt, target in made["training"])


def folded(ids: list[int]) -> list[int]:
    """Ids as T5's vocabulary has room for, with its end."""
    words = T5_SMALL["vocab_size"] - T5_FIRST_WORD  # type: ignore[operator]
    return [T5_FIRST_WORD + one % words for one in ids[:-1]] + [T5_END]


def read_rows(path: Path) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows."""
    read = json.loads(path.read_text())
    training, held = ([Row(*one) for one in read[key]] for key in ("training", "held"))
    return training, held


def write_t5(folder: Path, tokenizer: Path, vocabulary: int | None = None) -> None:
    """Save a T5 of flan-t5-small's shape with random weights, and a tokenizer; its ids need a `vocabulary` of their own."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    torch.manual_seed(SEED)
    model = T5ForConditionalGeneration(T5Config(**T5_SMALL | ({"vocab_size": vocabulary} if vocabulary else {})))
    with torch.no_grad():  # logits of about unit size, as a trained model's are at first sight of a text
        model.lm_head.weight.mul_(model.config.d_model**-0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
