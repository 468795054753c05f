"""The part of the audit that needs tokens: what is cut, lost, or doubled."""

from collections.abc import Sequence

from luthier.data.audit import Finding, finding
from luthier.data.task import SPLITS, Example, Examples
from luthier.encoding.encoder import Encoder
from luthier.errors import UserError


def audit_tokens(encoder: Encoder, examples: Examples) -> list[Finding]:
    """Findings about the token ids that training and scoring will use."""
    return [one for split in SPLITS for one in _split(encoder, getattr(examples, split), split)]


def _split(encoder: Encoder, rows: Sequence[Example], split: str) -> list[Finding]:
    tokenizer = encoder.tokenizer
    special = set(tokenizer.all_special_ids)
    frame = _special_count(encoder.prompt_ids(Example("", "a", "")), special)
    no_room, cut, stops_early, injected, doubled, lost = [], [], [], [], [], []
    removed = 0
    for row in rows:
        if not row.completion or not row.prompt:
            continue  # said already, by the audit of the text
        try:
            encoded = encoder.encode(row)
        except UserError:
            no_room.append(row.id)
            continue
        prompt, target = encoder.prompt_ids(row), encoded.target
        if encoded.cut:
            cut.append(row.id)
            removed = max(removed, encoded.cut)
        if special & set(target[:-1]) - {tokenizer.unk_token_id}:
            stops_early.append(row.id)
        elif not row.shots and not row.system and _special_count(prompt, special) != frame:
            injected.append(row.id)
        start = tokenizer.bos_token_id
        if start is not None and not encoder.chat and prompt[:2] == [start, start]:
            doubled.append(row.id)
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in target[:-1]:
            lost.append(row.id)
    texts = {row.id: row for row in rows}
    first = lambda ids: texts[ids[0]].completion if ids else ""  # noqa: E731
    return [
        *finding(
            "no room for the prompt", "error", split, no_room, first(no_room),
            f"The answer alone fills {encoder.max_length} tokens: raise max_length or shorten it; a target is never cut.",
        ),
        *finding(
            "special token in the answer", "error", split, stops_early, first(stops_early),
            "The answer's text holds a token of the tokenizer's own, such as its end token: remove it from the data.",
        ),
        *finding(
            "doubled start token", "error", split, doubled, texts[doubled[0]].prompt if doubled else "",
            "The template writes the start token that the tokenizer adds already: remove it from the template.",
        ),
        *finding(
            "special token in the prompt", "warning", split, injected, texts[injected[0]].prompt if injected else "",
            "The prompt's text holds a token of the tokenizer's own: the model reads it as structure, not as text.",
        ),
        *finding(
            "prompt cut", "warning", split, cut, texts[cut[0]].prompt if cut else "",
            f"The prompt is longer than {encoder.max_length} tokens and loses its middle (at most {removed} tokens).",
        ),
        *finding(
            "signs lost", "warning", split, lost, first(lost),
            "The tokenizer does not know a sign of the answer and trains its unknown token instead.",
        ),
    ]  # fmt: skip


def _special_count(ids: Sequence[int], special: set[int]) -> int:
    return sum(one in special for one in ids)
