"""What is trained on, shown: rendered rows with the trained tokens apart from the prompt's."""

from dataclasses import dataclass
from pathlib import Path

from luthier.data.task import load_examples
from luthier.errors import UserError
from luthier.models.base import DEFAULT_CONTEXT
from luthier.models.load import context_length, read_tokenizer
from luthier.recipe import Recipe


@dataclass(frozen=True)
class PreviewRow:
    """One training row as text: the prompt, each trained token, and how many prompt tokens were cut."""

    id: str
    prompt: str
    prompt_tokens: int
    trained: list[str]
    cut: int


def preview(recipe: Recipe, rows: int = 3) -> list[PreviewRow]:
    """Encode the first training rows of each task exactly as training will; reads the tokenizer, not the weights.

    Raises UserError for a recipe without training rows.
    """
    tokenizer, config = read_tokenizer(recipe.base)
    encoder = recipe.encoder(tokenizer, config.is_encoder_decoder, context_length(config, DEFAULT_CONTEXT))
    examples = []
    for task in recipe.tasks:
        examples += load_examples(task, Path(recipe.data), recipe.seed).train[:rows]
    if not examples:
        raise UserError(f"The task {recipe.task.name!r} has no training rows (`train`), so there is nothing to show.")
    shown = []
    for example in examples:
        row = encoder.encode(example)
        pieces = [tokenizer.decode([token]) for token in row.target]
        shown.append(PreviewRow(row.id, tokenizer.decode(row.prompt), len(row.prompt), pieces, row.cut))
    return shown
