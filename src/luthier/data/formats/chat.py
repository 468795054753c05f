"""Chat logs: `messages` (role, content), ShareGPT (from, value) and Alpaca (instruction, input, output) rows.

A conversation becomes its exchanges: pairs of what was asked and what the assistant answered. Every answer is learnt,
nothing else is. A question after the last answer has no target and is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from luthier.errors import UserError

Format = Literal["messages", "sharegpt", "alpaca"]

# Column, key of the speaker, key of the text.
LOGS = {"messages": ("messages", "role", "content"), "sharegpt": ("conversations", "from", "value")}
_SPEAKERS = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
}  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """A system prompt and at least one exchange (question, answer)."""

    system: str | None
    exchanges: tuple[tuple[str, str], ...]


def read_conversation(values: Mapping[str, Any], form: Format, where: str) -> Conversation:
    """The conversation a row holds; raises UserError, naming the row, for what is none."""
    return _alpaca(values, where) if form == "alpaca" else _log(values, form, where)


def _alpaca(values: Mapping[str, Any], where: str) -> Conversation:
    for column in ("instruction", "output"):
        _column(values, column, where)
    question = str(values["instruction"])
    if values.get("input"):
        question += f"\n\n{values['input']}"
    history = values.get("history") or []
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise UserError(f"{where}: `history` must be a list of [question, answer] pairs.")
    exchanges = [(str(asked), str(answered)) for asked, answered in history]
    return Conversation(values.get("system") or None, (*exchanges, (question.strip(), str(values["output"]).strip())))


def _log(values: Mapping[str, Any], form: str, where: str) -> Conversation:
    column, speaker_key, text_key = LOGS[form]
    turns = _column(values, column, where)
    if not isinstance(turns, list):
        raise UserError(f"{where}: `{column}` holds a {type(turns).__name__}; it must be a list of turns.")
    system: list[str] = [str(values["system"])] if values.get("system") else []
    exchanges: list[tuple[str, str]] = []
    asked: list[str] = []
    answering = False
    for number, turn in enumerate(turns, 1):
        place = f"{where}, turn {number}"
        speaker, text = _turn(turn, speaker_key, text_key, place)
        if speaker == "system":
            if exchanges or asked:
                raise UserError(f"{place} is a system turn in the middle; only the first turns may be.")
            system.append(text)
        elif speaker == "user":
            asked = [*asked, text] if not answering else [text]
            answering = False
        elif not asked:
            raise UserError(
                f"{place} is the assistant's, but nothing was asked before it. Remove it, or add the question."
            )
        elif answering:  # one answer in two turns
            exchanges[-1] = (exchanges[-1][0], f"{exchanges[-1][1]}\n\n{text}")
        else:
            exchanges.append(("\n\n".join(asked), text))
            answering = True
    if not exchanges:
        raise UserError(
            f"{where} has no answer of the assistant, so there is nothing to learn from it. Remove the row."
        )
    return Conversation("\n\n".join(system) or None, tuple(exchanges))


def _turn(turn: Any, speaker_key: str, text_key: str, place: str) -> tuple[str, str]:
    if not isinstance(turn, dict) or speaker_key not in turn or text_key not in turn:
        raise UserError(f"{place} must hold `{speaker_key}` and `{text_key}`; it is {str(turn)[:80]!r}.")
    speaker = _SPEAKERS.get(str(turn[speaker_key]).lower())
    if speaker is None:
        raise UserError(f"{place} is by {turn[speaker_key]!r}. Allowed: {', '.join(_SPEAKERS)}.")
    if not isinstance(turn[text_key], str):
        raise UserError(f"{place}: `{text_key}` holds a {type(turn[text_key]).__name__}; only text can be learnt.")
    return speaker, turn[text_key].strip()


def _column(values: Mapping[str, Any], column: str, where: str) -> Any:
    if values.get(column) is None:
        raise UserError(
            f"{where} has no column {column!r}. It has: {', '.join(map(str, values))}. Rename it with `columns`."
        )
    return values[column]
