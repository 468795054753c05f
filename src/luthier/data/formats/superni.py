"""Super-NaturalInstructions prompts in the Tk-Instruct forms (Wang et al. 2022, https://arxiv.org/abs/2204.07705).

    [task name. ] Definition: ... [ Positive Example 1 - ...] [ Negative Example 1 - ...]
    Now complete the following example -
    Input: ...
    Output:

Examples are added while definition, examples and input fit the limit; the first that does not fit ends its
kind. A source that is too long all the same keeps its beginning.
"""

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TkInstruct:
    """Which parts a prompt holds: name, definition, how many examples of each kind, explanations."""

    name: bool = False
    definition: bool = True
    positives: int = 0
    negatives: int = 0
    explanations: bool = False


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
