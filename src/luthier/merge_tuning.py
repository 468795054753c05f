"""Ship it: a tuning and its base as one ordinary model, with a certificate of what that changed."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from luthier.encoding.batches import encode_all
from luthier.encoding.encoder import Encoded
from luthier.errors import UserError
from luthier.evaluation.certificate import Drift, drift
from luthier.evaluation.limits import MAX_FLIPS, MAX_KL
from luthier.files import whole_folder, write_json
from luthier.held_out import held_out
from luthier.models.base import BaseModel
from luthier.models.export import merged_weights, requantize, write_model
from luthier.models.load import DTYPES, BaseSpec
from luthier.session import Session
from luthier.tuning.files import load_tuning

Onto = Literal["best", "16-bit", "dequantized", "requantized"]
ONTO = ("best", "16-bit", "dequantized", "requantized")


@dataclass(frozen=True)
class Choice:
    """One way to merge: how far it is from the unmerged tuning, and its bytes on disk."""

    drift: Drift
    bytes: int


@dataclass(frozen=True)
class Certificate:
    """What merging changed, for each choice there was; `chosen` is the one that was written."""

    run: str
    tuning: str
    method: str
    base: dict[str, Any]
    dtype: str
    split: str
    rows: int
    max_kl: float
    max_flips: float
    choices: dict[str, Choice]
    chosen: str

    @property
    def passed(self) -> bool:
        """Whether the chosen one is within the limits."""
        return self.choices[self.chosen].drift.within(self.max_kl, self.max_flips)

    def to_json(self) -> dict[str, Any]:
        """As certificate.json holds it."""
        return {"luthier": 1, **asdict(self), "passed": self.passed}


def merge(
    run: str | Path,
    tuning: str,
    out: str | Path,
    *,
    onto: str = "best",
    dtype: str | None = None,
    rows: int = 50,
    max_kl: float = MAX_KL,
    max_flips: float = MAX_FLIPS,
    allow_drift: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Certificate:
    """Write `tuning` of a run, folded into its base, to the new folder `out`: a model that loads without Luthier.

    The merged model is read back and compared with the unmerged tuning on held-out `rows`, in the precision it is
    saved in (`dtype`; default the base's). On a 4-bit base each way to merge is tried and the nearest written:
    onto the original 16-bit weights, onto the dequantized ones, or quantized again. Raises UserError, and
    writes nothing, for a tuning that is in no weight, a folder that exists, and, unless `allow_drift`, where the
    written model would be further than `max_kl` (nats a token) or `max_flips` (share of greedy tokens) away.
    """
    if onto not in ONTO:
        raise UserError(f"--onto {onto!r} is unknown. Allowed: {', '.join(ONTO)}.")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is unknown. Allowed: {', '.join(DTYPES)}.")
    session = Session(run)
    base, name = session.base, tuning
    method = session.trained(name)
    if not base.quantized and onto != "best":
        raise UserError(f"--onto {onto} is for a base in 4 bits, and this run's is not. Leave --onto out.")
    saved = DTYPES[dtype] if dtype else base.dtype
    split, examples = held_out(session.recipe, name, rows)
    encoded = encode_all(session.encoder, [row for _, each in examples for row in each], method.virtual_tokens())
    with whole_folder(Path(out)) as partial:
        choices = {}
        for choice in _choices(base):
            say(f"merging onto the {choice} weights" if base.quantized else "merging")
            _write(choice, session, name, partial, saved)
            say(f"comparing on {len(encoded)} {split} rows")
            choices[choice] = _measure(session, name, partial / choice, saved, encoded)
        best = min(choices, key=lambda choice: choices[choice].drift.kl)
        if onto != "best" and onto not in choices:
            raise UserError(f"--onto {onto}: the base was read in 4 bits and its {onto} weights are not at hand.")
        certificate = Certificate(
            run=str(session.directory.path),
            tuning=name,
            method=method.method,
            base={"model": base.spec.model, "fingerprint": base.fingerprint(), "quantized": base.quantized},
            dtype=str(saved).removeprefix("torch."),
            split=split,
            rows=len(encoded),
            max_kl=max_kl,
            max_flips=max_flips,
            choices=choices,
            chosen=best if onto == "best" else onto,
        )
        if not certificate.passed and not allow_drift:
            raise UserError(_too_far(certificate))
        _keep(partial, certificate.chosen, list(choices))
        write_json(partial / "certificate.json", certificate.to_json())
    return certificate


def _choices(base: BaseModel) -> list[str]:
    if not base.quantized:
        return ["base"]
    return [*(["16-bit"] if base.spec.quantize else []), "dequantized", "requantized"]


def _write(choice: str, session: Session, name: str, partial: Path, saved: torch.dtype) -> None:
    base = session.base
    if choice == "requantized":
        requantize(base, partial / "dequantized", partial / choice, saved)
    elif choice == "16-bit":
        plain = BaseModel.load(replace(base.spec, quantize=None))
        load_tuning(plain, session.directory.tuning(name), name)
        write_model(plain, merged_weights(plain, name, saved), partial / choice)
    else:
        write_model(base, merged_weights(base, name, saved), partial / choice)


def _measure(session: Session, name: str, folder: Path, saved: torch.dtype, rows: list[Encoded]) -> Choice:
    """Read the merged model back from disk and compare it with the tuning as it was trained."""
    session.base.use(name)
    spec = session.base.spec
    dtype = next(key for key, value in DTYPES.items() if value == saved)
    there = BaseSpec(str(folder), dtype, str(session.base.device), trust_remote_code=spec.trust_remote_code)  # type: ignore[arg-type]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Choice(drift(session.base, BaseModel.load(there), rows), size)


def _keep(partial: Path, chosen: str, choices: list[str]) -> None:
    """Leave the chosen model's files alone in the folder."""
    for choice in choices:
        if choice != chosen:
            shutil.rmtree(partial / choice)
    for file in (partial / chosen).iterdir():
        file.rename(partial / file.name)
    (partial / chosen).rmdir()


def _too_far(certificate: Certificate) -> str:
    found = certificate.choices[certificate.chosen].drift
    return (
        f"The merged model would answer otherwise than the tuning {certificate.tuning!r}: KL {found.kl:.2g} nats a token "
        f"(limit {certificate.max_kl:g}), {found.flips:.1%} of greedy tokens flipped (limit {certificate.max_flips:.1%}), "
        f"on {found.tokens} tokens in {certificate.dtype}. Nothing was written. Give --dtype float32, another --onto, "
        "other limits (--max-kl, --max-flips), or take it as it is with --allow-drift."
    )
