"""Super-NaturalInstructions prompts in the Tk-Instruct forms (Wang et al. 2022, https://arxiv.org/abs/2204.07705).

    [task name. ] Definition: ... [ Positive Example 1 - ...] [ Negative Example 1 - ...]
    Now complete the following example -
    Input: ...
    Output:

Examples are added while definition, examples and input fit the limit; the first that does not fit ends its
kind. A source that is too long all the same keeps its beginning.
"""

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from luthier.errors import UserError, nearest

# Tokens of a source, as Tk-Instruct was trained.
LIMIT = 1024


class TokenCounter(Protocol):
    """How long a text is to the base: what a prompt that must fit is built with."""

    def count(self, text: str) -> int:
        """Tokens of a text, with those the tokenizer puts around it."""

    def head(self, text: str, limit: int) -> str:
        """The text of the first `limit` tokens."""

    def identity(self) -> list[Any]:
        """All that decides these numbers, as JSON can say it."""


@dataclass(frozen=True)
class TkInstruct:
    """Which parts a prompt holds: name, definition, how many examples of each kind, explanations."""

    name: bool = False
    definition: bool = True
    positives: int = 0
    negatives: int = 0
    explanations: bool = False


@dataclass(frozen=True)
class TkInstructTemplate:
    """A Tk-Instruct form used as a task's template, for the rows of Super-NaturalInstructions' task files.

    Within `limit` tokens, end token included; a prompt for a new text is not limited.
    """

    form: TkInstruct
    limit: int
    fixed: tuple[str, ...] | None = None

    def parts(self, values: Mapping[str, Any], where: str, tokens: TokenCounter | None) -> list[str]:
        """Prompt and completion; raises UserError for a row of another kind."""
        if "output" not in values:
            raise UserError(f"{where}: no column 'output'. The row has: {', '.join(map(str, values))}.")
        return [self.render_prompt(values, where, tokens), str(values["output"]).strip()]

    def choices(self, values: Mapping[str, Any], where: str) -> tuple[str, ...] | None:
        """The task's answer choices."""
        return self.fixed

    def variables(self) -> set[str]:
        """Names of the columns that it uses."""
        return {"input", "output"}

    def prompt_variables(self) -> set[str]:
        """Names of the columns that must be there."""
        return {"definition", "input"} if self.form.definition else {"input"}

    def render_prompt(self, values: Mapping[str, Any], where: str, tokens: TokenCounter | None = None) -> str:
        """The prompt alone, as long as `tokens` allows."""
        for name in [*sorted(self.prompt_variables()), *(["task"] if self.form.name else [])]:
            if name not in values:
                raise UserError(
                    f"{where}: no column {name!r}, which tk-instruct prompts are made of (Super-NaturalInstructions' task "
                    f"files have it). {nearest(name, map(str, values))}"
                )
        self._check(values, where)
        instance = {
            "Task": values.get("task", ""),
            "Definition": values.get("definition", ""),
            "Positive Examples": values.get("positive_examples") or [],
            "Negative Examples": values.get("negative_examples") or [],
            "Instance": {"input": values["input"]},
        }
        if tokens is None:
            return build_source(instance, self.form, 1, lambda _: 0, lambda text, _: text).text
        return build_source(instance, self.form, self.limit, tokens.count, tokens.head).text

    def _check(self, values: Mapping[str, Any], where: str) -> None:
        """Raise UserError unless definition and examples have the shapes of a task file's."""
        definition = values.get("definition", "")
        texts = definition if isinstance(definition, list) else [definition]
        if self.form.definition and not all(isinstance(one, str) for one in texts):
            raise UserError(f"{where}: `definition` must be a text or a list of texts; it is {definition!r:.80}.")
        for name, wanted in (("positive_examples", self.form.positives), ("negative_examples", self.form.negatives)):
            examples = values.get(name) or []
            if wanted and not (isinstance(examples, list) and all(map(_is_example, examples))):
                raise UserError(
                    f"{where}: `{name}` must be a list of objects with the texts `input` and `output` (and perhaps "
                    f"`explanation`); it is {examples!r:.80}."
                )


def _is_example(given: Any) -> bool:
    return (
        isinstance(given, Mapping)
        and isinstance(given.get("input"), str)
        and isinstance(given.get("output"), str)
        and isinstance(given.get("explanation", ""), str)
    )


def read_form(text: str, choices: tuple[str, ...] | None) -> TkInstructTemplate:
    """The template that ``def+pos2+neg2+expl@1024`` means: parts of the prompt, and the limit in tokens.

    Raises UserError for another part.
    """
    named, _, limit = text.partition("@")
    given: dict[str, Any] = {"definition": False}
    words = {"name": "name", "def": "definition", "expl": "explanations"}
    for part in named.split("+"):
        found = re.fullmatch(r"(pos|neg)(\d+)", part)
        if found:
            given["positives" if found[1] == "pos" else "negatives"] = int(found[2])
        elif part in words:
            given[words[part]] = True
        else:
            raise UserError(
                f"'tk-instruct:{text}': unknown part {part!r}. {nearest(part, [*words, 'pos2', 'neg2'])} Write, for example, "
                "tk-instruct:def+pos2 or tk-instruct:name+def+pos2+neg2+expl@1024 (name, def, posN, negN, expl; @ a limit in tokens)."
            )
    if limit and (not limit.isdigit() or int(limit) < 16):
        raise UserError(f"'tk-instruct:{text}': the limit {limit!r} must be a number of tokens, at least 16.")
    return TkInstructTemplate(TkInstruct(**given), int(limit or LIMIT), choices)


@dataclass(frozen=True)
class Source:
    """A built prompt, and how many examples of each kind fitted."""

    text: str
    positives: int
    negatives: int
    truncated: bool


def build_source(
    instance: Mapping[str, Any],
    form: TkInstruct,
    limit: int,
    count_tokens: Callable[[str], int],
    keep_head: Callable[[str, int], str],
) -> Source:
    """Build the prompt of one instance within `limit` tokens, end token included.

    `instance` has Task, Definition, Positive Examples, Negative Examples and Instance.input;
    `keep_head(text, limit)` gives the text of a source's first tokens.
    """
    name = f"{instance['Task']}. " if form.name else ""
    definition = _definition(instance["Definition"]) if form.definition else ""
    question = _ended(f"Now complete the following example -\nInput: {str(instance['Instance']['input']).strip()}")
    question += "\nOutput: "

    positives = _examples(instance.get("Positive Examples", [])[: form.positives], "Positive", form.explanations)
    negatives = _examples(instance.get("Negative Examples", [])[: form.negatives], "Negative", form.explanations)
    kept_positives: list[str] = []
    for text in positives:
        if count_tokens(definition + " ".join(kept_positives) + text + question) > limit:
            break
        kept_positives.append(text)
    kept_negatives: list[str] = []
    for text in negatives:
        before = definition + " ".join(kept_positives) + " ".join(kept_negatives)
        if count_tokens(before + text + question) > limit:
            break
        kept_negatives.append(text)
    source = name + definition + "".join(kept_positives) + "".join(kept_negatives) + question
    truncated = count_tokens(source) > limit
    text = keep_head(source, limit) if truncated else source
    return Source(text, len(kept_positives), len(kept_negatives), truncated)


def _definition(given: str | list[str]) -> str:
    first = given if isinstance(given, str) else (given[0] if given else "")
    return _ended(f"Definition: {first.strip()}") + "\n\n"


def _examples(examples: list[Mapping[str, str]], kind: str, explanations: bool) -> list[str]:
    texts = []
    for number, example in enumerate(examples, 1):
        text = _ended(f" {kind} Example {number} -\nInput: {example['input'].strip()}") + "\n"
        text += _ended(f" Output: {example['output'].strip()}") + "\n"
        if explanations and "explanation" in example:
            text += _ended(f" Explanation: {example['explanation'].strip()}") + "\n"
        texts.append(text + "\n")
    return texts


def _ended(text: str) -> str:
    """With a full stop, unless it ends in (ASCII) punctuation."""
    return text if text[-1] in string.punctuation else text + "."
