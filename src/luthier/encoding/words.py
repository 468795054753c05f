"""Token ids through a memo of words: text repeats its words, so most of a tokenizer's work was done before.

Exact by construction, and only where it is: with a byte-level pre-tokenizer no token spans the place between a sign
and a space that a sign follows, so the ids of a text are those of its pieces cut there, one after the other. Any
other tokenizer reads every text whole.
"""

import json
import re
from collections.abc import Callable
from typing import Any

_BOUNDARY = re.compile(r"(?<=\S)(?= \S)")
# Pieces kept; at some 200 bytes each, a memo that is full takes about 100 MB.
KEPT = 500_000


def reader(tokenizer: Any) -> Callable[[str], list[int]]:
    """A function from text to ids, without special tokens around it; the same ids as the tokenizer's own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    if not cuts_at_spaces(json.loads(backend.to_str())):
        return lambda text: list(backend.encode(text, add_special_tokens=False).ids)
    return WordMemo(backend)


class WordMemo:
    """Reads a text piece by piece, each piece through the tokenizer once."""

    def __init__(self, backend: Any):
        self._backend = backend
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """The ids of a text."""
        known = self._known
        ids: list[int] = []
        for piece in _BOUNDARY.split(text):
            found = known.get(piece)
            if found is None:
                found = self._learn(piece)
            ids += found
        return ids

    def _learn(self, piece: str) -> list[int]:
        if len(self._known) >= KEPT:
            self._known.clear()
        found: list[int] = self._backend.encode(piece, add_special_tokens=False).ids
        self._known[piece] = found
        return found


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
