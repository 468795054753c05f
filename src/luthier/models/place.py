"""Where a base is read from, and what is said when it cannot be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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


@contextmanager
def explained(place: Place) -> Iterator[None]:
    """Turn what transformers raises for unreadable files into one message."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(
            f"The base model could not be read from the {place.title}: {' '.join(str(error).split())[:300]} "
            "A directory must hold config.json, model.safetensors and the tokenizer's files."
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' warnings and bars, which would break ours, off the terminal from here on."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    yield
