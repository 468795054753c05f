"""The sides: one training of one job, each in a process of its own. Peers import nothing of Luthier."""

import math
import resource
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.jobs import BATCH, SEED, Job, Row
from training.table import Measured


@dataclass(frozen=True)
class Way:
    """How a peer lays out an optimizer step: `batch` rows at a time, or packed sequences of `packed` tokens.

    Plain: the very rows of Luthier's steps, padded to the longest of a batch; `grouped` draws rows of like lengths.
    """

    batch: int
    grouped: bool = False
    packed: int = 0
    tcmalloc: bool = False

    @property
    def accumulated(self) -> int:
        """Batches of an optimizer step."""
        return BATCH // self.batch

    def __str__(self) -> str:
        layout = f"packed {self.packed}" if self.packed else f"batch {self.batch}{' grouped' if self.grouped else ''}"
        return layout + (", tcmalloc" if self.tcmalloc else "")


AS_INSTALLED = Way(BATCH)


@dataclass(frozen=True)
class Work:
    """One training: what all sides are given."""

    job: Job
    training: list[Row]
    held: list[Row]
    model: Path
    dtype: str
    way: Way
    out: Path
    device: str = "cpu"
    own: dict[str, Any] = field(default_factory=dict)  # of Luthier's training settings


def ways(side: str, training: list[Row]) -> list[Way]:
    """The ways in which a peer is tried for its best, without tcmalloc."""
    found = [AS_INSTALLED, Way(1), *(Way(batch, grouped=True) for batch in (2, 4, 8))]
    if side == "trl":
        longest = max(map(len, training))
        found += [Way(1, packed=size) for size in sorted({max(1024, longest), max(2048, longest)})]
    return found


def luthier(work: Work, mode: Any = None) -> Measured:
    """Luthier's train call; `mode` is a context that the training runs in."""
    from pydantic import TypeAdapter

    from luthier.encoding.encoder import Encoded
    from luthier.evaluation.score import loss_and_accuracy
    from luthier.models.base import BaseModel
    from luthier.models.load import BaseSpec
    from luthier.training.loop import train
    from luthier.training.settings import TrainingSettings
    from luthier.tuning import METHODS, attach

    training = InOrder([Encoded(str(n), row.prompt, row.target) for n, row in enumerate(work.training)])
    held = [Encoded(str(n), row.prompt, row.target) for n, row in enumerate(work.held)]
    base = BaseModel.load(
        BaseSpec(
            model=str(work.model), dtype=work.dtype, device=work.device, quantize="nf4" if work.job.quantize else None
        )  # type: ignore[arg-type]
    )
    start = loss_and_accuracy(base, held)[0] if mode is None else math.nan
    method: Any = TypeAdapter(METHODS[work.job.ours["method"]]).validate_python(work.job.ours)
    attach(base, "t", method, SEED)
    settings = TrainingSettings(
        **work.own, epochs=1, batch_size=BATCH, learning_rate=work.job.rate, weight_decay=0.0, warmup=0.0
    )
    with mode or nullcontext():
        started = time.perf_counter()
        progress = train(base, "t", training, settings, SEED, work.out)
        finish(work.device)
        seconds = time.perf_counter() - started
    peak = peak_bytes(work.device)
    base.use("t")
    found = {"seconds": seconds, "step_seconds": progress.seconds, "steps": progress.step, "peak_bytes": peak}
    return found | {"loss": loss_and_accuracy(base, held)[0], "loss_start": start}


class InOrder:
    """Rows as they stand, epoch after epoch: they were shuffled before all sides got them."""

    def __init__(self, rows: list[Any]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, k: int) -> Any:
        return self.rows[k % len(self.rows)]

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Any) -> None:
        pass


def profiled(work: Work) -> dict[str, Any]:
    """Luthier's training twice: alone for its time, and with every matrix product counted."""
    import torch

    from training.profile import Products, summary

    plain = luthier(work)
    products = Products()
    counted = luthier(work, products)
    found = summary(products, counted["step_seconds"], plain["step_seconds"], getattr(torch, work.dtype))
    return {**plain, "profile": found}


def trainer(work: Work, masters: bool = False) -> Measured:
    """transformers' Trainer, with PEFT where the job has an adapter; loss on the completion."""
    from transformers import Trainer, TrainingArguments

    model = peer_model(work, "float32" if masters else work.dtype)
    precision = {"bf16": True} if masters and work.dtype == "bfloat16" else {}
    settings = TrainingArguments(**arguments(work), **precision, remove_unused_columns=False)
    rows = [{"input_ids": r.prompt + r.target, "labels": [-100] * len(r.prompt) + r.target} for r in work.training]
    made = Trainer(model=model, args=settings, train_dataset=rows, data_collator=padded)
    return timed(made, model, work)


def masters(work: Work) -> Measured:
    """The Trainer with fp32 masters: weights in float32, bf16=True."""
    return trainer(work, masters=True)


def seq2seq(work: Work) -> Measured:
    """transformers' Seq2SeqTrainer with PEFT."""
    from torch.nn.functional import cross_entropy
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    model = peer_model(work, work.dtype)

    def loss_of_step(outputs: Any, labels: Any, num_items_in_batch: Any) -> Any:
        """T5's own loss is the mean of each accumulated batch, summed over them: here the step's mean."""
        logits = outputs["logits"].flatten(0, 1)
        return cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum") / num_items_in_batch

    own = {"compute_loss_func": loss_of_step} if work.way.accumulated > 1 else {}
    settings = Seq2SeqTrainingArguments(**arguments(work), remove_unused_columns=False)
    rows = [
        {"input_ids": r.prompt, "labels": r.target, "decoder_input_ids": [0, *r.target[:-1]]} for r in work.training
    ]
    made = Seq2SeqTrainer(model=model, args=settings, train_dataset=rows, data_collator=padded, **own)
    return timed(made, model, work)


def trl(work: Work) -> Measured:
    """TRL's SFTTrainer as its guide has it, on rows tokenized beforehand: loss on the completion."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list(
        [
            {"input_ids": r.prompt + r.target, "completion_mask": [0] * len(r.prompt) + [1] * len(r.target)}
            for r in work.training
        ]
    )
    way, model = work.way, peer_model(work, work.dtype)
    settings = arguments(work) | {"max_length": None, "completion_only_loss": True}
    if work.dtype == "float32" or way != AS_INSTALLED:
        settings["bf16"] = False  # by default it is on: autocast, which 16-bit weights have no need of
    if way.packed:
        rows = way.packed * len(work.training) / sum(map(len, work.training))  # in a full sequence
        settings |= {"packing": True, "packing_strategy": "bfd", "max_length": way.packed}
        settings["gradient_accumulation_steps"] = max(1, round(BATCH / rows))
    made = SFTTrainer(
        model=model, args=SFTConfig(**settings), train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(work.model),
    )  # fmt: skip
    if work.job.quantize:  # TRL makes the adapters of a 4-bit base bfloat16, whatever the base computes in
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, work.dtype))
    return timed(made, made.model, work)


def adapters(work: Work) -> Measured:
    """`adapters`' own trainer, on transformers 4.57, which draws rows at random unless its sampler is another."""
    import adapters as library
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, TrainingArguments

    class InTurn(library.AdapterTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return super()._get_train_sampler(dataset) if work.way.grouped else SequentialSampler(self.train_dataset)

    torch.manual_seed(SEED)
    dtype = getattr(torch, work.dtype)
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype)
    library.init(model)
    assert work.job.adapters is not None
    name, told = work.job.adapters
    model.add_adapter("t", config=getattr(library, name)(**told))
    model.train_adapter("t")
    model.adapter_to("t", dtype=dtype)
    settings = arguments(work)
    settings["group_by_length"] = settings.pop("train_sampling_strategy") == "group_by_length"
    rows = [{"input_ids": r.prompt + r.target, "labels": [-100] * len(r.prompt) + r.target} for r in work.training]
    given = TrainingArguments(**settings, remove_unused_columns=False)
    made = InTurn(model=model, args=given, train_dataset=rows, data_collator=padded)
    return timed(made, model, work)


SIDES: dict[str, Callable[[Work], Measured]] = {
    "luthier": luthier, "profile": profiled, "trainer": trainer, "masters": masters, "seq2seq": seq2seq, "trl": trl,
    "adapters": adapters,
}  # fmt: skip


def peer_model(work: Work, dtype: str) -> Any:
    """The base as a peer's users read it, with PEFT's adapter."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

    torch.manual_seed(SEED)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if work.job.quantize:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )  # fmt: skip
    model = (AutoModelForSeq2SeqLM if work.job.t5 else AutoModelForCausalLM).from_pretrained(work.model, **options)
    if work.job.peft is None:
        return model
    name, settings = work.job.peft
    if "prompt_tuning_init" in settings:
        from luthier.tuning.prompt_tuning import INIT_TEXT

        settings = settings | {"prompt_tuning_init_text": INIT_TEXT, "tokenizer_name_or_path": str(work.model)}
    return peft.get_peft_model(
        model, getattr(peft, name)(task_type="SEQ_2_SEQ_LM" if work.job.t5 else "CAUSAL_LM", **settings)
    )


def arguments(work: Work) -> dict[str, Any]:
    """What all peers' trainers are told."""
    return {
        "output_dir": str(work.out), "per_device_train_batch_size": work.way.batch,
        "gradient_accumulation_steps": work.way.accumulated,
        "train_sampling_strategy": "group_by_length" if work.way.grouped else "sequential",
        "num_train_epochs": 1, "learning_rate": work.job.rate, "lr_scheduler_type": "linear", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "save_strategy": "no", "report_to": [], "use_cpu": work.device == "cpu", "seed": SEED,
        "disable_tqdm": True, "logging_strategy": "no", "dataloader_pin_memory": False, "gradient_checkpointing": False,
    }  # fmt: skip


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch padded to its longest row."""
    import torch

    def column(key: str, fill: int) -> Any:
        longest = max(len(row[key]) for row in rows)
        return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

    batch = {key: column(key, -100 if key == "labels" else 0) for key in rows[0]}
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return batch | {"attention_mask": (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()}


def timed(made: Any, model: Any, work: Work) -> Measured:
    """The train call's seconds, the peak of memory, and the loss on the held-out targets, row by row."""
    import torch

    started = time.perf_counter()
    made.train()
    finish(work.device)
    seconds = time.perf_counter() - started
    peak = peak_bytes(work.device)
    model.eval()
    total, count = 0.0, 0
    at = lambda ids: torch.tensor(ids, device=model.device)  # noqa: E731
    with torch.no_grad():
        for row in work.held:
            if work.job.t5:
                inputs = {"input_ids": at([row.prompt]), "decoder_input_ids": at([[0, *row.target[:-1]]])}
                logits = model(**inputs).logits[0].float()
            else:
                ids = at([row.prompt + row.target])
                logits = model(input_ids=ids, logits_to_keep=len(row.target) + 1).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, at(row.target), reduction="sum"))
            count += len(row.target)
    return {"seconds": seconds, "steps": made.state.global_step, "peak_bytes": peak, "loss": total / count}


def finish(device: str) -> None:
    """Wait for what an accelerator was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_bytes(device: str) -> int:
    """The most memory held: the accelerator's tensors, else this process, of its own address space where Linux says so, else
    since its parent forked.
    """
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
