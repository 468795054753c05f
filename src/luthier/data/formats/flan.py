"""FLAN's template pairs (Wei et al. 2021; Chung et al. 2022), from a YAML or JSON form without Python.

A pair is `inputs` and `targets` with ``{field}`` places. Substitution is a plain replacement of known names,
not str.format: braces in the data stay, and so do unknown names' places.
Few-shot: for each exemplar inputs_prefix + input + x_y_delimiter + targets_prefix + target, then
example_separator; last the question, up to where its target would begin.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.errors import UserError, nearest

_PLACE = re.compile(r"{(\w+)}")


@dataclass(frozen=True)
class Pattern:
    """One template pair with its few-shot delimiters."""

    inputs: str
    targets: str
    inputs_prefix: str = ""
    targets_prefix: str = ""
    x_y_delimiter: str = "\n\n"
    example_separator: str = "\n\n"
    final_suffix: str = ""
    input_pattern: str = "{{inputs}}{final_suffix}"


@dataclass(frozen=True)
class Pair:
    """A rendered example."""

    inputs: str
    targets: str


def substitute(pattern: str, values: Mapping[str, Any]) -> str:
    """Put values in their places; what a value itself holds is not looked at again."""
    return _PLACE.sub(lambda found: str(values.get(found[1], found[0])), pattern)


def options_field(options: Sequence[str]) -> str:
    """FLAN's ``{options_}``: the answer choices as a list."""
    return "OPTIONS:\n- " + "\n- ".join(options)


def zero_shot(pattern: Pattern, values: Mapping[str, Any]) -> Pair:
    """Render a pair alone."""
    return Pair(substitute(pattern.inputs, values), substitute(pattern.targets, values))


def few_shot(
    query: tuple[Pattern, Mapping[str, Any]],
    exemplars: Sequence[tuple[Pattern, Mapping[str, Any]]],
    separator: str | None = None,
    folded: bool = False,
) -> Pair:
    """Show exemplars before the query, each by its own pattern.

    `separator` stands between all of them; default: the query pattern's. The query ends where its target would
    begin, without trailing spaces. FLAN has two forms: fixed (1, 2 or 5 shots) also drops a newline that ends the
    targets' prefix; the `folded` one (any number of shots) keeps it and strips the targets.
    """
    pattern, values = query
    between = pattern.example_separator if separator is None else separator
    shown = [_asked(one, of) + _target(one, of, folded) for one, of in exemplars]
    asked = _asked(pattern, values) if folded else _asked(pattern, values, pattern.targets_prefix.rstrip())
    body = between.join([*shown, asked]).rstrip(" ")
    return Pair(_wrapped(pattern, values, body), _target(pattern, values, folded))


def natural_instructions(pattern: Pattern, values: Mapping[str, Any], exemplars: Sequence[tuple[str, str]]) -> Pair:
    """FLAN's few-shot form of Natural Instructions: the definition once, then exemplars (input, output).

    The target keeps the separator behind it, as FLAN's does.
    """
    shown = [
        _asked(pattern, {**values, "input": question}) + substitute(pattern.targets, {"output": answer})
        for question, answer in exemplars
    ]
    body = pattern.example_separator.join([*shown, _asked(pattern, values)]).rstrip(" ")
    return Pair(_wrapped(pattern, values, body), substitute(pattern.targets, values) + pattern.example_separator)


def keep_exemplars(exemplars: Sequence[tuple[int, int]], query: int, limit: int = 1920) -> list[int]:
    """Which exemplars, given as (input tokens, target tokens), fit before a query of `query` tokens.

    They are kept in order while their sum is at most limit - query; with none left FLAN drops the example.
    """
    kept, total = [], 0
    for place, (inputs, targets) in enumerate(exemplars):
        total += inputs + targets
        if total > limit - query:
            break
        kept.append(place)
    return kept


def _asked(pattern: Pattern, values: Mapping[str, Any], targets_prefix: str | None = None) -> str:
    prefix = pattern.targets_prefix if targets_prefix is None else targets_prefix
    return f"{pattern.inputs_prefix}{substitute(pattern.inputs, values)}{pattern.x_y_delimiter}{prefix}"


def _target(pattern: Pattern, values: Mapping[str, Any], strip: bool) -> str:
    target = substitute(pattern.targets, values)
    return target.strip() if strip else target


def _wrapped(pattern: Pattern, values: Mapping[str, Any], body: str) -> str:
    """Put the body into the pattern's frame: FLAN writes it for str.format, with doubled braces."""
    frame = pattern.input_pattern.replace("{final_suffix}", pattern.final_suffix)
    return substitute(frame.replace("{{", "{").replace("}}", "}"), {**values, "inputs": body})


@dataclass(frozen=True)
class Fields:
    """How a raw row becomes FLAN's fields, in this order: `replace` rewrites columns, `labels` names an index, `add` is constant.

    replace: ``{dialogue: [["<.*>", " "]]}``, regular expressions; labels: ``{answer: {label: ["yes", "no"]}}``, the
    new field from the column's index; add: ``{options: ["yes", "no"]}``.
    """

    replace: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    labels: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    add: Mapping[str, Any] = field(default_factory=dict)

    def of(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The row with its fields; raises UserError for a column that is not there and an index outside its labels."""
        found = {**row, **self.add}
        for column in [*self.replace, *(column for named in self.labels.values() for column in named)]:
            if column not in row:
                raise UserError(
                    f"{where}: no column {column!r}, which `fields` uses. The row has: {', '.join(map(str, row))}."
                )
        found = self.rewritten(found)
        for name, named in self.labels.items():
            for column, labels in named.items():
                if not isinstance(row[column], int) or not 0 <= row[column] < len(labels):
                    raise UserError(
                        f"{where}: {column} is {row[column]!r}; `fields` has labels for 0 to {len(labels) - 1}."
                    )
                found[name] = labels[row[column]]
        return found

    def rewritten(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with the rewrites of the columns it has: a new text has no label."""
        found = dict(row)
        for column in self.replace.keys() & row.keys():
            for old, new in self.replace[column]:
                found[column] = re.sub(old, new, str(found[column]))
        return found


@dataclass(frozen=True)
class FlanTemplate:
    """A pair used as a task's template; ``{options_}`` is written from the answer choices, here or in the row.

    Without choices of the task's, a row's column `options` (a list) has them, as FLAN's fields do.
    """

    pattern: Pattern
    fixed: tuple[str, ...] | None = None
    fields: Fields = Fields()

    def parts(self, values: Mapping[str, Any], where: str, *, seed: int | str | None = None) -> list[str]:
        """Prompt and completion; raises UserError for a place that the row cannot fill."""
        filled = self._filled(self.fields.of(values, where))
        for text in (self.pattern.inputs, self.pattern.targets):
            self._check(text, filled, where)
        pair = zero_shot(self.pattern, filled)
        return [pair.inputs.strip(), pair.targets.strip()]

    def frame(self, values: Mapping[str, Any], where: str) -> tuple[str, str, str, str, str]:
        """What FLAN's form for any number of shots puts around a row: see `luthier.data.task.Frame`."""
        filled = self._filled(self.fields.of(values, where))
        question, inputs = _asked(self.pattern, filled), substitute(self.pattern.inputs, filled).strip()
        opening, _, asking = question.partition(inputs) if inputs else (question, "", "")
        before, _, after = _wrapped(self.pattern, filled, "\0").partition("\0")
        return opening, asking, before, after, self.pattern.example_separator

    def choices(self, values: Mapping[str, Any], where: str) -> tuple[str, ...] | None:
        """The answer choices of a row, None where there are none."""
        if self.fixed is not None:
            return self.fixed
        options = values.get("options", self.fields.add.get("options"))
        return tuple(map(str, options)) if isinstance(options, (list, tuple)) else None

    def variables(self) -> set[str]:
        """Names of the columns that the pair uses."""
        return {*_PLACE.findall(self.pattern.inputs), *_PLACE.findall(self.pattern.targets)} - {"options_"}

    def prompt_variables(self) -> set[str]:
        """Names of the columns that the inputs use."""
        names = set(_PLACE.findall(self.pattern.inputs))
        return names - {"options_"} if self.fixed is not None else {"options" if n == "options_" else n for n in names}

    def render_prompt(self, values: Mapping[str, Any], where: str) -> str:
        """The inputs alone: a new text has no target yet."""
        filled = self._filled(self.fields.rewritten(values))
        self._check(self.pattern.inputs, filled, where)
        return substitute(self.pattern.inputs, filled).strip()

    def _filled(self, values: Mapping[str, Any]) -> dict[str, Any]:
        choices = self.choices(values, "")
        return {**values, "options_": options_field(choices)} if choices and "options_" not in values else dict(values)

    def _check(self, text: str, values: Mapping[str, Any], where: str) -> None:
        for name in _PLACE.findall(text):
            if name == "options_" and name not in values:
                raise UserError(
                    f"{where}: the pair uses {{options_}}: give the task `choices`, or its rows a list `options`."
                )
            if name not in values:
                columns = [str(column) for column in values if column != "options_"]
                raise UserError(
                    f"{where}: no column {name!r}, which the pair uses. {nearest(name, columns)} "
                    f"The row has: {', '.join(columns)}."
                )
