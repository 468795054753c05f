"""Template: a row becomes a prompt and a completion, through Jinja in a sandbox.

One text holds both, as promptsource (Bach et al. 2022) writes them: ``Sum up: {{ dialogue }} ||| {{ summary }}``.
The text is rendered first and split on ``|||`` after, each part stripped; a ``|||`` inside a top-level
field is protected and never splits.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment

from luthier.errors import UserError, nearest

SEPARATOR = "|||"
# Stands for a literal separator while a row renders (promptsource's own literal).
PROTECTED = "3ed2dface8203c4c9dfb1a5dc58e41e0"
# promptsource cuts each rendered expression to this many characters, by rewriting the template's text.
TRUNCATED = " | string | truncate(2048) }}"


class Template:
    """A Jinja text that renders rows; sandboxed, so a template from outside may not reach Python.

    `choices` are the answer choices: a list, or a Jinja text that renders to them split by ``|||``.
    With `strict` an unknown variable is an error; without, it renders empty, as promptsource has it.
    """

    def __init__(self, text: str, choices: str | Sequence[str] | None = None, strict: bool = True):
        self.text, self.choice_text, self.strict = text, choices, strict
        self._compiled: dict[str, jinja2.Template] = {}
        # Parsed, not compiled: compiling computes constants, and a template from outside is computed elsewhere.
        for one in (text, choices):
            if isinstance(one, str):
                self._explained(one, self._environment.parse)

    @property
    def _environment(self) -> SandboxedEnvironment:
        return _strict if self.strict else _lenient

    def parts(
        self, values: Mapping[str, Any], where: str, *, seed: int | str | None = None, truncate: bool = False
    ) -> list[str]:
        """All parts between separators. `seed` decides what the filters `choice` and `random` draw."""
        _draws.seed(seed)
        if "answer_choices" in values and not self.strict:
            raise self._failed(where, ValueError("a row may not have a column named answer_choices"), values)
        protected = _protect(values)
        if not self.strict:
            choices = self.choices(values, where)
            protected["answer_choices"] = None if choices is None else list(choices)
        text = self.text.replace("}}", TRUNCATED) if truncate else self.text
        return [_unprotect(part) for part in self._run(text, protected, where, values).split(SEPARATOR)]

    def choices(self, values: Mapping[str, Any], where: str) -> tuple[str, ...] | None:
        """The answer choices of a row, None where the template has none."""
        if self.choice_text is None:
            return None
        if not isinstance(self.choice_text, str):
            return tuple(map(str, self.choice_text))
        text = self._run(self.choice_text, _protect(values), where, values)
        return tuple(_unprotect(choice) for choice in text.split(SEPARATOR))

    def variables(self) -> set[str]:
        """Names of the columns that the template uses."""
        return jinja2.meta.find_undeclared_variables(self._environment.parse(self.text))

    def prompt_variables(self) -> set[str]:
        """Names of the columns that the part before the first ``|||`` uses."""
        used = jinja2.meta.find_undeclared_variables(self._cut() or _strict.parse(self.text))
        return used if self.strict else used - {"answer_choices"}  # these are the template's own

    def _cut(self) -> jinja2.nodes.Template | None:
        """The part before the first ``|||`` by itself; None where a block holds both: ``{% if a %}b ||| c{% endif %}``."""
        try:
            return _strict.parse(self.text.split(SEPARATOR)[0])
        except jinja2.TemplateSyntaxError:
            return None

    def render_prompt(self, values: Mapping[str, Any], where: str) -> str:
        """Render the part before the first ``|||`` alone: a new text has no completion yet."""
        if self._cut() is not None:
            return Template(self.text.split(SEPARATOR)[0], self.choice_text, self.strict).parts(values, where)[0]
        whole = Template(self.text, self.choice_text, strict=False)
        prompt = whole.parts(values, where)[0]  # what only the completion uses renders empty
        if not prompt:
            raise UserError(
                f"{where}: the template gives no prompt. It uses {', '.join(sorted(self.prompt_variables()))}; the row "
                f"has: {', '.join(map(str, values))}."
            )
        return prompt

    def _run(self, text: str, protected: dict[str, Any], where: str, values: Mapping[str, Any]) -> str:
        try:
            return self._compile(text).render(protected)
        except UserError:
            raise
        except Exception as error:  # whatever an expression inside the template raised
            raise self._failed(where, error, values) from error

    def _compile(self, text: str) -> jinja2.Template:
        # Jinja draws from a constant list while it compiles, so a template that draws is compiled each time.
        if text not in self._compiled or "choice" in text or "random" in text:
            self._compiled[text] = self._explained(text, self._environment.from_string)
        return self._compiled[text]

    def _explained(self, text: str, read: Callable[[str], Any]) -> Any:
        try:
            return read(text)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"The template is not valid Jinja, line {error.lineno}: {error.message}. It is: {_short(text)}"
            ) from error
        except (RecursionError, MemoryError) as error:
            raise UserError(f"The template is nested too deeply to be read. It is: {_short(text)}") from error

    def _failed(self, where: str, error: Exception, values: Mapping[str, Any]) -> UserError:
        if isinstance(error, SecurityError):
            reason = f"the template does what is not allowed: {error}."
        elif isinstance(error, jinja2.UndefinedError):
            reason = _explain(error, values)
        else:
            reason = f"the template failed: {type(error).__name__}: {error}."
        return UserError(f"{where}: {reason} The template is: {_short(self.text)}")


def _protect(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.replace(SEPARATOR, PROTECTED) if isinstance(value, str) else value for key, value in values.items()
    }


def _unprotect(part: str) -> str:
    return part.replace(PROTECTED, SEPARATOR).strip()


def _explain(error: jinja2.UndefinedError, values: Mapping[str, Any]) -> str:
    message = str(error)
    name = message.split("'")[1] if message.count("'") >= 2 else ""
    if message == f"'{name}' is undefined":
        columns = list(map(str, values))
        return (
            f"no column {name!r}, which the template uses. {nearest(name, columns)} The row has: {', '.join(columns)}."
        )
    return f"the template uses something the row lacks: {message}."


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:117] + "...")


# What `choice` and `random` draw from; seeded before every rendering, so that a row renders the same each time.
_draws = random.Random()


def _most_frequent(items: Sequence[Any]) -> list[Any] | None:
    """All items that occur most often, in order of first occurrence."""
    if not items:
        return None
    counts = Counter(items).most_common()
    return [item for item, count in counts if count == counts[0][1]]


def _environment(undefined: type[jinja2.Undefined]) -> SandboxedEnvironment:
    environment = SandboxedEnvironment(undefined=undefined)
    environment.filters["choice"] = lambda items: _draws.choice(items)
    environment.filters["random"] = lambda items: _draws.choice(items)
    environment.filters["most_frequent"] = _most_frequent
    environment.filters["highlight"] = lambda text: f"<span style='color: #F08080'>{text}</span>"
    environment.globals["zip"] = zip
    return environment


_strict = _environment(jinja2.StrictUndefined)
_lenient = _environment(jinja2.Undefined)
