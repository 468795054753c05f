"""Hooks of the user's own: functions that are told every step and validation of a training."""

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.errors import UserError
from luthier.training.loop import Hook


def own_hooks(names: Sequence[str], folder: Path) -> list[Hook]:
    """The functions that `FILE.py:FUNCTION` (FILE in `folder`) or `package.module:FUNCTION` name; their code is run.

    Raises UserError for what cannot be imported and for what cannot be called.
    """
    return [_found(name, folder) for name in names]


def _found(name: str, folder: Path) -> Hook:
    place, colon, function = name.rpartition(":")
    if not colon or not place or not function.isidentifier():
        raise UserError(f"training.hooks: {name!r} is not of the form FILE.py:FUNCTION or package.module:FUNCTION.")
    try:
        found = getattr(_module(place, folder), function)
    except Exception as error:  # a user's code may raise anything while it is imported
        raise UserError(f"training.hooks: {name!r} could not be imported: {type(error).__name__}: {error}.") from error
    if not callable(found):
        raise UserError(f"training.hooks: {name!r} is a {type(found).__name__}, which cannot be called with an event.")
    hook: Hook = found
    return hook


def _module(place: str, folder: Path) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    file = folder / Path(place).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
