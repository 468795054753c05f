"""Token ids through a memo of words: text repeats its words, so most of a tokenizer's work was done before.

Exact by construction, and only where it is: with a byte-level pre-tokenizer no token spans the place between a sign
and a space that a sign follows, so the ids of a text are those of its pieces cut there, one after the other. Any
other tokenizer reads every text whole.
"""

import json
import re
from collections.abc import Callable
from itertools import chain
from typing import Any

_BOUNDARY = re.compile(r"(?<=\S)(?= \S)")
# Pieces kept; at some 200 bytes each, a memo that is full takes about 100 MB.
KEPT = 500_000
# Characters of a piece that is kept: a text without spaces is one piece, and comes once.
LONGEST = 40


def reader(tokenizer: Any) -> Callable[[str], list[int]]:
    """A function from text to ids, without special tokens around it; the same ids as the tokenizer's own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    content = json.loads(backend.to_str())
    if not cuts_at_spaces(content):
        return lambda text: list(backend.encode(text, add_special_tokens=False).ids)
    return WordMemo(backend, added_tokens(content))


class WordMemo:
    """Reads a text word by word, each word through the tokenizer once; `added` finds the tokenizer's added tokens."""

    def __init__(self, backend: Any, added: re.Pattern[str] | None = None):
        self._backend = backend
        self._words: dict[str, list[int]] = {}  # ids of a space and the word
        self._pieces: dict[str, list[int]] = {}
        self._added = added

    def __call__(self, text: str) -> list[int]:
        """The ids of a text."""
        if " " not in text:
            return list(self._piece(text))
        first, *words, last = text.split(" ")
        if not first or first[-1].isspace():
            return self._irregular(text)
        each = list(map(self._words.get, words))
        while None in each:
            place = each.index(None)
            word = words[place]
            if not word or word != word.strip():
                return self._irregular(text)
            each[place] = self._learn(self._words, word, f" {word}")
        ids = list(self._piece(first))
        ids.extend(chain.from_iterable(each))  # type: ignore[arg-type]
        if last and not last[0].isspace():
            return ids + self._piece(f" {last}")  # it may end in white space: chat turns do
        return self._irregular(text)

    def _irregular(self, text: str) -> list[int]:
        """Text in which some space stands beside white space: only the other spaces are places to cut."""
        return [token for piece in _BOUNDARY.split(text) for token in self._piece(piece)]

    def _piece(self, piece: str) -> list[int]:
        """The ids of a piece; what stands between the tokenizer's added tokens is read apart, as the tokenizer does."""
        found = self._pieces.get(piece)
        if found is not None:
            return found
        parts = [part for part in self._added.split(piece) if part] if self._added else []
        if len(parts) < 2:
            return self._learn(self._pieces, piece, piece)
        return [token for part in parts for token in self._piece(part)]

    def _learn(self, known: dict[str, list[int]], name: str, text: str) -> list[int]:
        found: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if len(name) > LONGEST:
            return found
        if len(known) >= KEPT:
            known.clear()
        known[name] = found
        return found


def added_tokens(content: dict[str, Any]) -> re.Pattern[str] | None:
    """A pattern that finds the added tokens, which are taken out of a text before anything else, the longest first.

    None where one is looked for in normalized text: then what it meets is not what stands here.
    """
    added = content.get("added_tokens", [])
    if not added or any(token.get("normalized") for token in added):
        return None
    longest = sorted((token["content"] for token in added), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest))})")


def cuts_at_spaces(content: dict[str, Any]) -> bool:
    """Whether the tokenizer, given as its tokenizer.json, surely cuts where a sign meets a space and a sign."""
    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return False
    if (content.get("normalizer") or {"type": "NFC"}).get("type") != "NFC":
        return False
    if content.get("truncation") or content.get("padding"):
        return False
    # An added token may eat the space beside it or hold one itself.
    for token in content.get("added_tokens", []):
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word") or " " in token["content"]:
            return False
    model = content.get("model", {})
    if model.get("type") != "BPE" or model.get("dropout"):
        return False
    before = [step for step in steps[:-1] if step.get("type") != "Digits"]
    if not before:
        return bool(last.get("use_regex", True))
    return len(before) == 1 and before[0].get("type") == "Split" and before[0]["pattern"].get("Regex") in SPLITS


# Llama 3, Qwen 2 and GPT-2: a match that has begun with a sign ends before a space.
SPLITS = frozenset(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    ]
)
