"""Template: a row becomes a prompt and a completion, through Jinja in a sandbox.

One text holds both, as promptsource writes them: ``Summarise: {{ dialogue }} ||| {{ summary }}``.
The text is rendered first and split on ``|||`` after, each part stripped; a ``|||`` inside a
field is protected and never splits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.meta
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from luthier.errors import UserError, nearest

SEPARATOR = "|||"
# Stands for a literal separator while a row renders (promptsource's own literal).
PROTECTED = "3ed2dface8203c4c9dfb1a5dc58e41e0"

_environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


@dataclass(frozen=True)
class Rendered:
    """A rendered row: the prompt, the completion (None: the template has no ``|||``)."""

    prompt: str
    completion: str | None


class Template:
    """A Jinja text that renders rows; sandboxed, so a template from outside may not reach Python."""

    def __init__(self, text: str):
        self.text = text
        self._compiled = _compile(text)

    def render(self, values: Mapping[str, Any], where: str) -> Rendered:
        """Render one row; `where` names it in errors. Raises UserError for an unknown variable."""
        parts = self._render(values, where)
        if len(parts) > 2:
            raise UserError(
                f"{where}: the template renders to {len(parts)} parts; one '{SEPARATOR}' between prompt "
                "and completion is allowed."
            )
        return Rendered(parts[0], parts[1] if len(parts) == 2 else None)

    def prompt_variables(self) -> set[str]:
        """Names of the columns that the part before the first ``|||`` uses."""
        return jinja2.meta.find_undeclared_variables(_environment.parse(self.text.split(SEPARATOR)[0]))

    def render_prompt(self, values: Mapping[str, Any], where: str) -> str:
        """Render the part before the first ``|||`` alone: a new text has no completion yet."""
        return Template(self.text.split(SEPARATOR)[0])._render(values, where)[0]

    def _render(self, values: Mapping[str, Any], where: str) -> list[str]:
        protected = {
            key: value.replace(SEPARATOR, PROTECTED) if isinstance(value, str) else value
            for key, value in values.items()
        }
        try:
            text = self._compiled.render(protected)
        except jinja2.UndefinedError as error:
            raise UserError(f"{where}: {_explain(error, values)} The template is: {_short(self.text)}") from None
        except SecurityError as error:
            raise UserError(f"{where}: the template does what is not allowed: {error}.") from None
        except Exception as error:  # whatever an expression inside the template raised
            raise UserError(
                f"{where}: the template failed: {type(error).__name__}: {error}. It is: {_short(self.text)}"
            ) from None
        return [part.replace(PROTECTED, SEPARATOR).strip() for part in text.split(SEPARATOR)]


def choices_of(spec: str | list[str] | None, values: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The answer choices of a row: a list, or a Jinja text that renders to choices split by ``|||``."""
    if spec is None:
        return ()
    if isinstance(spec, list):
        return tuple(str(choice) for choice in spec)
    return tuple(Template(spec)._render(values, where))


def _compile(text: str) -> jinja2.Template:
    try:
        return _environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"The template is not valid Jinja, line {error.lineno}: {error.message}. It is: {_short(text)}"
        ) from None


def _explain(error: jinja2.UndefinedError, values: Mapping[str, Any]) -> str:
    message = str(error)
    name = message.split("'")[1] if message.count("'") >= 2 else ""
    if message == f"'{name}' is undefined":
        return f"no column {name!r}, which the template uses. {nearest(name, map(str, values))} The row has: {', '.join(map(str, values))}."
    return f"the template uses something the row lacks: {message}."


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:117] + "...")
