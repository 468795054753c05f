"""An answer's words against a reference's: which are its own, and which it lacks."""

from collections.abc import Sequence

from markupsafe import Markup, escape

from luthier.metrics.lcs import lcs_places


def marked(answer: str, references: Sequence[str]) -> Markup:
    """The answer as HTML: its own words in <ins>, the reference's that it lacks in <del>, the common ones plain.

    Words are compared by a longest common subsequence, without case and punctuation, as ROUGE-L compares them; of several
    references the nearest counts. Everything is escaped.
    """
    if not references:
        return escape(answer)
    words, keys = _words(answer)
    reference, common = max(
        ((reference, lcs_places(_words(reference)[1], keys)) for reference in references),
        key=lambda one: 2 * len(one[1]) / (len(keys) + len(_words(one[0])[1]) or 1),
    )
    theirs, their_keys = _words(reference)
    pieces: list[tuple[str, str]] = []
    done = 0
    given = iter(range(len(words)))
    for place in common:
        lacking = [("del", word) for word in theirs[done:place]]
        for ours in given:
            if keys[ours] == their_keys[place]:
                pieces += [*lacking, ("", words[ours])]
                break
            pieces.append(("ins", words[ours]))
        done = place + 1
    pieces += [("ins", words[ours]) for ours in given]
    pieces += [("del", word) for word in theirs[done:]]
    return Markup(" ").join(_joined(pieces))


def _words(text: str) -> tuple[list[str], list[str]]:
    """The words as they stand, and what they are compared by."""
    words = text.split()
    return words, ["".join(sign for sign in word.lower() if sign.isalnum()) or word for word in words]


def _joined(pieces: Sequence[tuple[str, str]]) -> list[Markup]:
    """Neighbours of a kind under one mark."""
    found: list[Markup] = []
    start = 0
    for place in range(1, len(pieces) + 1):
        if place == len(pieces) or pieces[place][0] != pieces[start][0]:
            text = escape(" ".join(word for _, word in pieces[start:place]))
            kind = pieces[start][0]
            found.append(Markup(f"<{kind}>{text}</{kind}>") if kind else text)
            start = place
    return found
