"""In-context examples: which training pairs stand in the prompt, and how many fit."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from luthier.data.task import Example
from luthier.errors import UserError


def choose_shots(train: Sequence[Example], count: int, seed: int) -> list[tuple[str, str]]:
    """Draw `count` prompt/completion pairs from the training split, by seed."""
    usable = [example for example in train if example.completion]
    if count > len(usable):
        raise UserError(
            f"shots: {count} asked for, but the training split has {len(usable)} rows with a target. "
            "Lower `shots` or add training rows."
        )
    return [(example.prompt, example.completion) for example in random.Random(f"shots {seed}").sample(usable, count)]


def with_shots(
    example: Example, shots: Sequence[tuple[str, str]], budget: int, count_tokens: Callable[[Example], int]
) -> Example:
    """Put as many shots before the prompt as fit into `budget` tokens (prompt and answer), first ones first."""
    for kept in range(len(shots), 0, -1):
        fuller = replace(example, shots=(*shots[:kept], *example.shots))
        if count_tokens(fuller) <= budget:
            return fuller
    return example
