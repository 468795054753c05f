"""In-context examples: which training pairs stand in the prompt, and how many fit."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from luthier.data.task import Example
from luthier.errors import UserError

FEW = 8  # so many are counted together first: they mostly fit


def choose_shots(train: Sequence[Example], count: int, seed: int) -> list[tuple[str, str]]:
    """Draw `count` prompt/completion pairs from the training split, by seed."""
    return [(example.prompt, example.completion) for example in _drawn(train, count, count, seed)]


def similar_shots(
    train: Sequence[Example], questions: Sequence[Example], count: int, seed: int
) -> list[list[tuple[str, str]]]:
    """For each question the `count` training pairs whose prompts are most like it by BM25, the likest first.

    Ties (no word in common, say) go by seed. Raises UserError where bm25s, which does the ranking, is not installed.
    """
    needs_similar()
    import bm25s

    candidates = _drawn(train, count, None, seed)
    if not questions:
        return []
    ranking = bm25s.BM25()
    ranking.index(_words([one.prompt for one in candidates]), show_progress=False)
    found, _ = ranking.retrieve(_words([one.prompt for one in questions]), k=count, show_progress=False)
    return [[(candidates[place].prompt, candidates[place].completion) for place in row] for row in found]


def needs_similar() -> None:
    """Raise UserError where bm25s is not installed."""
    if find_spec("bm25s") is None:
        raise UserError(
            "selection: similar needs the package bm25s, which is not installed: pip install 'luthier[similar]'."
        )


def _words(texts: list[str]) -> Any:
    from bm25s import tokenize

    return tokenize(texts, token_pattern=r"(?u)\b\w+\b", stopwords=None, show_progress=False)


def _drawn(train: Sequence[Example], count: int, draw: int | None, seed: int) -> list[Example]:
    """`draw` examples with a target (None: all of them), in an order by seed; at least `count` must be there."""
    usable = [example for example in train if example.completion]
    if count > len(usable):
        raise UserError(
            f"shots: {count} asked for, but the training split has {len(usable)} rows with a target. "
            "Lower `shots` or add training rows."
        )
    return random.Random(f"shots {seed}").sample(usable, len(usable) if draw is None else draw)


def with_shots(
    example: Example,
    shots: Sequence[tuple[str, str]],
    budget: int,
    count_tokens: Callable[[Example], int],
    first_last: bool = False,
) -> Example:
    """Put as many shots before the prompt as fit into `budget` tokens (prompt and answer), first ones first.

    With `first_last` they stand in reverse: the first, kept longest, right before the question.
    """
    ordered = lambda kept: shots[:kept][::-1] if first_last else shots[:kept]  # noqa: E731
    shown = lambda kept: replace(example, shots=(*ordered(kept), *example.shots)) if kept else example  # noqa: E731
    fits = lambda kept: count_tokens(shown(kept)) <= budget  # noqa: E731
    if len(shots) <= FEW and fits(len(shots)):
        return shown(len(shots))
    # Of very many only about as many are counted as fit: doubled until they do not, then halved.
    least, most = 0, 1
    while most <= len(shots) and fits(most):
        least, most = most, 2 * most
    most = min(most, len(shots) + 1)
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return shown(least)
