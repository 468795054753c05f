"""What a tuning is trained on: its task's rows, or draws from a mixture; and the table of what was drawn."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from luthier.data.forms import InForm, in_form
from luthier.data.mixture import Mixture, entries, epoch_size
from luthier.data.stored import StoredExamples
from luthier.data.task import Examples, ExampleStream, Task
from luthier.encoding.encoder import Encoded, Encoder
from luthier.encoding.order import Mixed, Shuffled, Stream, Streamed, step_places
from luthier.encoding.stored import StoredRows, stored_rows
from luthier.recipe import Recipe, Tuning


def training_rows(
    recipe: Recipe,
    tuning: Tuning,
    tasks: Sequence[tuple[Task, Examples]],
    encoder: Encoder,
    reserve: int,
    say: Callable[[str], None] = lambda _: None,
    enrich: Callable[[StoredRows], Sequence[Encoded]] = lambda rows: rows,
) -> tuple[Stream, Callable[[int, int], dict[str, Any]]]:
    """The rows in their order, and what to report of them after so many steps of that batch size.

    `reserve` tokens are kept free in every row. Rows are encoded once and kept on disk, streamed ones as they come.
    `say` is told of prompts that had to be cut; `enrich` may add to the rows what training wants beside them.
    """
    mixture, seed = recipe.task, recipe.seed
    examples = {task.name: each for task, each in tasks}

    def encode(shown: StoredExamples | InForm, what: str) -> StoredRows:
        rows = stored_rows(encoder, shown, shown.key, reserve)
        if rows.cut_rows:
            say(
                f"{len(rows.cut_rows)} of {len(rows)} {what} prompts lost their middle to fit {encoder.max_length} "
                f"tokens: {', '.join(rows.cut_rows[:3])}{' ...' if len(rows.cut_rows) > 3 else ''}"
            )
        return rows

    def streamed(stream: ExampleStream) -> Streamed:
        assert tuning.training.max_steps is not None, "the recipe asks for it"
        drawn = tuning.training.max_steps * tuning.training.batch_size
        return Streamed(stream, lambda one: encoder.encode_all(one, reserve), drawn)

    if isinstance(mixture, Task) and not tuning.replay:
        own = examples[mixture.name]
        if own.stream is not None:
            flow = streamed(own.stream)
            return flow, lambda batch, steps: {"cut": 0, "left_out": flow.left_out, "mixture": []}
        rows = encode(_stored(own), "training")
        return Shuffled(enrich(rows), seed), lambda batch, steps: {"cut": len(rows.cut_rows), "mixture": []}
    chosen = mixture.only(tuning.tasks) if tuning.tasks and isinstance(mixture, Mixture) else mixture
    size = None
    if tuning.replay:
        examples |= {tuning.replay.task.name: recipe.examples(tuning.replay.task)}
        # An epoch goes through what is to be learnt as often as without the replay.
        size = round(_size_of(chosen, examples) / (1 - tuning.replay.share))
        chosen = tuning.replay.beside(chosen)
    assert isinstance(chosen, Mixture)
    count = lambda task: len(examples[task.name].train)  # noqa: E731
    flat = entries(chosen, count)
    budget = encoder.max_length - reserve
    each: list[StoredRows | Streamed] = []
    for entry in flat:
        flowing = examples[entry.task.name].stream
        if flowing is not None:
            each.append(streamed(flowing))
            continue
        shown = in_form(
            entry,
            _stored(examples[entry.task.name]),
            lambda task: recipe.examples(task, train_only=True),
            seed,
            budget,
            encoder.count,
        )
        each.append(encode(shown, f"training ({entry.task.name}, {entry.form})"))
    enriched = [enrich(rows) if isinstance(rows, StoredRows) else rows for rows in each]
    stream = Mixed(enriched, [entry.rate for entry in flat], size or epoch_size(chosen, count), seed)

    def describe(batch: int, steps: int) -> dict[str, Any]:
        drawn = step_places(stream, batch, steps - 1).stop if steps else 0
        counts = stream.draws.counts(drawn)
        table = [
            {
                "task": entry.task.name,
                "form": entry.form,
                "asked": entry.rate,
                "got": got / max(1, drawn),
                "rows": None if isinstance(rows, Streamed) else len(rows),
                "epochs": None if isinstance(rows, Streamed) else got / len(rows),
                "tokens": rows.tokens if isinstance(rows, Streamed) else _tokens(stream, place, rows, got),
            }
            for place, (entry, rows, got) in enumerate(zip(flat, each, counts, strict=True))
        ]
        return {
            "cut": sum(len(rows.cut_rows) for rows in each if isinstance(rows, StoredRows)),
            "left_out": sum(rows.left_out for rows in each if isinstance(rows, Streamed)),
            "mixture": table,
        }

    return stream, describe


def _size_of(own: Task | Mixture, examples: Mapping[str, Examples]) -> int:
    """Draws of an epoch over what is to be learnt."""
    if isinstance(own, Task):
        return len(examples[own.name].train)
    return epoch_size(own, lambda task: len(examples[task.name].train))


def _stored(examples: Examples) -> StoredExamples:
    assert isinstance(examples.train, StoredExamples)
    return examples.train


def _tokens(stream: Mixed, entry: int, rows: StoredRows, got: int) -> int:
    """Tokens of an entry's first `got` rows: whole turns over its rows at once, the last turn row by row."""
    lengths = rows.lengths()
    turns, rest = divmod(got, len(rows))
    last = [stream.draws.row(entry, turns * len(rows) + place) for place in range(rest)]
    return int(turns * lengths.sum() + lengths[last].sum())
