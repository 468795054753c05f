"""What is trained on, shown: rendered rows with the trained tokens apart from the prompt's."""

from dataclasses import dataclass

from luthier.data.task import Example
from luthier.errors import UserError
from luthier.recipe import Recipe


@dataclass(frozen=True)
class PreviewRow:
    """One training row as text: the prompt (after the earlier answers), each trained token, and how many prompt tokens were cut."""

    id: str
    prompt: str
    prompt_tokens: int
    trained: list[str]
    cut: int
    earlier: tuple[tuple[str, list[str]], ...] = ()  # of a conversation: text and the trained tokens after it


def preview(recipe: Recipe, rows: int = 3) -> list[PreviewRow]:
    """Encode the first training rows of each task exactly as training will; reads the tokenizer, not the weights.

    Raises UserError for a recipe without training rows.
    """
    encoder = recipe.read_encoder()
    tokenizer = encoder.tokenizer
    examples: list[Example] = []
    for task in recipe.tasks:
        examples += recipe.examples(task).train[:rows]
    if not examples:
        raise UserError(f"The task {recipe.task.name!r} has no training rows (`train`), so there is nothing to show.")
    shown = []
    pieces = lambda ids: [tokenizer.decode([token]) for token in ids]  # noqa: E731
    for row in [row for example in examples for row in encoder.encode_all(example)]:
        earlier, start = [], 0
        for first, stop in row.earlier:
            earlier.append((tokenizer.decode(row.prompt[start:first]), pieces(row.prompt[first:stop])))
            start = stop
        last = tokenizer.decode(row.prompt[start:])
        shown.append(PreviewRow(row.id, last, len(row.prompt), pieces(row.target), row.cut, tuple(earlier)))
    return shown
