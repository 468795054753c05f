"""Luthier fits one language model to many tasks and shows the evidence for every choice."""

from typing import TYPE_CHECKING, Any

from luthier.errors import Interrupted, UserError

if TYPE_CHECKING:
    from luthier.audit_rows import audit
    from luthier.inspect_tuning import inspect
    from luthier.merge_tuning import merge
    from luthier.preview_rows import preview
    from luthier.recipe import Recipe
    from luthier.recipe_file import load_recipe, make_recipe
    from luthier.repeated import run
    from luthier.report.schema import Report
    from luthier.session import Session

__all__ = [
    "Interrupted",
    "Recipe",
    "Report",
    "Session",
    "UserError",
    "audit",
    "inspect",
    "load_recipe",
    "make_recipe",
    "merge",
    "preview",
    "run",
]

# The rest loads torch and transformers, which takes seconds: only when it is asked for.
_HOMES = {
    "audit": "luthier.audit_rows",
    "Recipe": "luthier.recipe",
    "Report": "luthier.report.schema",
    "Session": "luthier.session",
    "inspect": "luthier.inspect_tuning",
    "load_recipe": "luthier.recipe_file",
    "make_recipe": "luthier.recipe_file",
    "merge": "luthier.merge_tuning",
    "preview": "luthier.preview_rows",
    "run": "luthier.repeated",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found
