"""Where a base is read from, and what is said when it cannot be read."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from luthier.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where a base is read from: transformers' source and options, and how errors call it."""

    source: str
    options: dict[str, Any]
    title: str
    gguf: str | None = None

    def here(self, name: str) -> Path | None:
        """One of its files, where that stands on this machine."""
        if Path(self.source).is_dir():
            file = Path(self.source) / name
            return file if file.is_file() else None
        found = try_to_load_from_cache(self.source, name, revision=self.options.get("revision"))
        return Path(found) if isinstance(found, str) else None


@contextmanager
def explained(place: Place) -> Iterator[None]:
    """Turn what transformers raises for unreadable files into one message."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, SafetensorError) as error:
        raise UserError(
            f"The base model could not be read from the {place.title}: {' '.join(str(error).split())[:300]} "
            "A directory must hold config.json, model.safetensors and the tokenizer's files."
        ) from None


def complete(place: Place, missing: Collection[str]) -> None:
    """Raise UserError where files lack weights, which transformers would draw at random."""
    if missing:
        raise UserError(
            f"The base model could not be read from the {place.title}: its files lack {len(missing)} of its weights "
            f"({', '.join(sorted(missing)[:3])}{', ...' if len(missing) > 3 else ''}). Is it complete, and of the architecture that config.json names?"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' warnings and bars, which would break ours, off the terminal from here on."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    yield
