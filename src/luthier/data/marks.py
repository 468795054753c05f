"""Marks: 8 bytes that stand for a text, and for its word sequences, so that a million rows can be compared in memory.

Case, accents' encoding, spacing and the punctuation at the end do not make a text another; signs inside it do, as those
of a sum. Equal in every process and run.
"""

import re
import string
import unicodedata
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

# Words in a sequence.
SHINGLE = 6
# Signs that are words by themselves: Chinese, Japanese and Korean are written without spaces.
_SIGN = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])")
_EDGES = string.punctuation + "\u2026\u3002\uff01\uff1f\u201c\u201d\u2018\u2019\u00ab\u00bb"
_ENDS = " .!?\u2026\u3002\uff01\uff1f"
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_KEPT = 500_000

Marks = NDArray[np.uint64]


def mark(text: str) -> tuple[int, list[str]]:
    """The mark of a text, and its words: folded, without the punctuation around them."""
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    pieces = folded.split()
    whole = " ".join(pieces)
    if not folded.isascii():
        pieces = _SIGN.sub(r" \1 ", folded).split()
    return _digest(whole.rstrip(_ENDS) or whole), [piece.strip(_EDGES) or piece for piece in pieces]


def shingles(words: list[str]) -> Marks:
    """The marks of all sequences of SHINGLE words, each once, sorted: (sequences,)."""
    count = len(words) - SHINGLE + 1
    if count < 1:
        return np.empty(0, np.uint64)
    each = np.fromiter(map(_words.__getitem__, words), np.uint64, len(words))
    sequence = each[:count].copy()
    for place in range(1, SHINGLE):
        sequence = sequence * _FACTOR + each[place : place + count]  # wraps: a polynomial modulo 2**64
    return np.unique(sequence)


class _Words(dict[str, int]):
    """Marks of words, each computed once."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _KEPT:
            self.clear()
        found = self[word] = _digest(word)
        return found


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


_words = _Words()
