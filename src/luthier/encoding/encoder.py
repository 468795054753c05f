"""Encoder: an example becomes prompt ids and target ids, the same in training and at inference.

The rule: the prompt is tokenized exactly as it will be at inference, the completion on its own after
it, then one end token. So no token straddles the two, the loss covers completion and end token and
nothing else, and a tuned model sees the prompt ids it was trained on.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from typing import Any

from luthier.data.task import Example
from luthier.encoding.chat import frame
from luthier.encoding.words import reader
from luthier.errors import UserError

# A cut prompt keeps at least this many tokens, or the row is refused: less is no prompt.
SHORTEST_PROMPT = 8
# Chat frames kept: one for each system prompt seen lately.
FRAMES = 64


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example; `cut` counts prompt tokens removed to fit.

    `earlier` are the places (start, stop) in the prompt of a conversation's earlier answers, trained on as well. `states`
    are what the first `frozen` blocks of the base make of the row, where that was computed beforehand: (T, D).
    """

    id: str
    prompt: list[int]
    target: list[int]  # completion + one end token
    cut: int = 0
    earlier: tuple[tuple[int, int], ...] = ()
    states: Any = field(default=None, compare=False, repr=False)
    frozen: int = field(default=0, compare=False)

    @property
    def labels(self) -> list[int]:
        """All tokens that are trained on, in order."""
        if not self.earlier:
            return self.target
        return [token for start, stop in self.earlier for token in self.prompt[start:stop]] + self.target

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


class Encoder:
    """Knows how one base wants its text: chat turns, plain text, or encoder and decoder."""

    def __init__(self, tokenizer: Any, *, encoder_decoder: bool, chat: bool, max_length: int):
        self.tokenizer = tokenizer
        self._read = reader(tokenizer)
        self.encoder_decoder = encoder_decoder
        self.chat = chat and not encoder_decoder
        self.max_length = max_length
        self._frames: dict[str | None, tuple[str, str] | None] = {}  # by system prompt
        if self.chat and not tokenizer.chat_template:
            raise UserError("base.chat is true, but the tokenizer has no chat template. Set `chat: false` or `auto`.")
        if tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no end token (eos_token), so a model could never learn to stop.")
        self.end: int = self._end_of_turn() if self.chat else tokenizer.eos_token_id
        # Tokens the tokenizer puts around every plain text (a start token; T5's end token).
        self._before, self._after = self._wrapping()

    def __getstate__(self) -> dict[str, Any]:
        """Without the function that reads text: it is made anew in another process."""
        return {key: value for key, value in self.__dict__.items() if key != "_read"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._read = reader(self.tokenizer)

    def widened(self, max_length: int) -> "Encoder":
        """The same encoder with another limit: prompts with shots may fill the whole context."""
        wide = copy(self)
        wide.max_length = max_length
        return wide

    @property
    def largest_id(self) -> int:
        """The largest token id there is."""
        return max(len(self.tokenizer) - 1, *self.tokenizer.all_special_ids, self.end)

    def identity(self) -> list[Any]:
        """All that decides which ids a text becomes, as JSON can say it."""
        template = self.tokenizer.chat_template if self.chat else None
        today = str(date.today()) if "strftime_now" in str(template) else None  # such a template writes the date
        return [
            self._content, template, today, self.encoder_decoder, self.max_length, self.end, self._before, self._after
        ]  # fmt: skip

    @cached_property
    def _content(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend is not None else repr(self.tokenizer)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def stops(self) -> list[int]:
        """Tokens that end a generated answer."""
        return sorted({self.end, self.tokenizer.eos_token_id})

    def prompt_text(self, example: Example) -> str:
        """The whole prompt as text: system, shots and question, as the model will read it."""
        if self.chat:
            if not example.shots and (around := self._frame(example.system)):
                return f"{around[0]}{example.prompt}{around[1]}"
            return str(self.tokenizer.apply_chat_template(_turns(example), tokenize=False, add_generation_prompt=True))
        shots = "".join(f"{question}\n{answer}\n\n" for question, answer in example.shots)
        system = f"{example.system}\n\n" if example.system else ""
        return f"{system}{shots}{example.prompt}" + ("" if self.encoder_decoder else "\n")

    def _frame(self, system: str | None) -> tuple[str, str] | None:
        if system not in self._frames:
            if len(self._frames) >= FRAMES:
                self._frames.clear()
            self._frames[system] = frame(self.tokenizer, system)
        return self._frames[system]

    def prompt_ids(self, example: Example) -> list[int]:
        """Token ids of the prompt, uncut."""
        ids = self.text_ids(self.prompt_text(example))
        return ids if self.chat else [*self._before, *ids, *self._after]

    def target_ids(self, completion: str) -> list[int]:
        """Token ids of a completion, with its one end token."""
        return [*self.text_ids(completion), self.end]

    def count(self, example: Example) -> int:
        """Tokens of prompt and target together (for an encoder-decoder: of the prompt)."""
        prompt = len(self.prompt_ids(example))
        return prompt if self.encoder_decoder else prompt + len(self.target_ids(example.completion))

    def encode(self, example: Example, reserve: int = 0) -> Encoded:
        """Encode one example; an over-long prompt loses its middle, a target is never cut.

        `reserve` keeps room for tokens that are added later (soft prompts, generated text).
        Raises UserError where the target leaves no room for a prompt.
        """
        prompt, target = self.prompt_ids(example), self.target_ids(example.completion)
        room = self.max_length - reserve - (0 if self.encoder_decoder else len(target))
        if room < min(SHORTEST_PROMPT, len(prompt)) or (self.encoder_decoder and len(target) > self.max_length):
            raise UserError(
                f"{example.id}: the completion has {len(target)} tokens and the limit is {self.max_length} "
                f"(max_length, or the model's context){f' less {reserve} reserved' if reserve else ''}: no room is "
                "left for the prompt. Raise `max_length` or shorten the row; a target is never cut."
            )
        if len(prompt) > room and example.learnt:  # a conversation loses its oldest exchanges, not its middle
            shorter = self.encode(self._shortened(example, room), reserve)
            return replace(shorter, cut=len(prompt) - len(shorter.prompt))
        kept = cut_middle(prompt, room)
        return Encoded(example.id, kept, target, len(prompt) - len(kept), self._earlier(example, kept))

    def _shortened(self, example: Example, room: int) -> Example:
        """A conversation without as few of its oldest exchanges as make it fit, or without all."""
        first = len(example.shots) - example.learnt

        def without(dropped: int) -> Example:
            shots = (*example.shots[:first], *example.shots[first + dropped :])
            return replace(example, shots=shots, learnt=example.learnt - dropped)

        fits = lambda dropped: len(self.prompt_ids(without(dropped))) <= room  # noqa: E731
        fewest = 1 + bisect_left(range(1, example.learnt), True, key=fits)
        return without(fewest)

    def encode_all(self, example: Example, reserve: int = 0) -> list[Encoded]:
        """The training rows of an example: one, or one an answer where a conversation's prompts do not continue
        one another id for id (a plain base, an encoder-decoder, a chat template that rewrites earlier turns).
        """
        if not example.learnt:
            return [self.encode(example, reserve)]
        whole = self.encode(example, reserve)
        first = len(example.shots) - example.learnt
        if whole.earlier and (whole.cut or len(whole.earlier) == example.learnt):
            return [whole]
        rows = []
        for turn in range(first, len(example.shots)):
            question, answer = example.shots[turn]
            shown = replace(
                example,
                id=f"{example.id} answer {turn - first + 1}",
                prompt=question,
                completion=answer,
                shots=example.shots[:turn],
                learnt=0,
            )
            rows.append(self.encode(shown, reserve))
        return [*rows, replace(whole, earlier=())]

    def _earlier(self, example: Example, prompt: list[int]) -> tuple[tuple[int, int], ...]:
        """Where the learnt answers stand in the prompt; none unless each stands there as it would be generated."""
        places = []
        for turn in range(len(example.shots) - example.learnt, len(example.shots)):
            question, answer = example.shots[turn]
            before = self.prompt_ids(replace(example, prompt=question, shots=example.shots[:turn], learnt=0))
            whole = before + self.target_ids(answer)
            if self.encoder_decoder or prompt[: len(whole)] != whole:
                return ()
            places.append((len(before), len(whole)))
        return tuple(places)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without special tokens, stripped."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text alone, with nothing around it."""
        return self._read(text)

    @property
    def tokens_before(self) -> int:
        """Tokens that the tokenizer puts before every plain text."""
        return len(self._before)

    def _wrapping(self) -> tuple[list[int], list[int]]:
        bare, wrapped = self.text_ids("a"), list(self.tokenizer("a").input_ids)
        for start in range(len(wrapped) - len(bare) + 1):
            if wrapped[start : start + len(bare)] == bare:
                # A decoder-only prompt goes on with the completion: nothing may stand after it.
                return wrapped[:start], wrapped[start + len(bare) :] if self.encoder_decoder else []
        return [], []

    def _end_of_turn(self) -> int:
        """The special token the chat template puts after an answer (not every model's is its eos)."""
        mark = "\u2402answer\u2402"
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
        after = str(self.tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(mark)[2]
        special = set(self.tokenizer.all_special_ids)
        return next((token for token in self.text_ids(after) if token in special), self.tokenizer.eos_token_id)


@dataclass(frozen=True)
class PromptTokens:
    """How long a prompt is to an encoder's base: for templates that build a prompt within a limit."""

    encoder: Encoder

    def count(self, text: str) -> int:
        """Tokens of a prompt, with those that the tokenizer or the chat template puts around it."""
        return len(self.encoder.prompt_ids(Example("", text, "")))

    def head(self, text: str, limit: int) -> str:
        """The text of the first tokens: `limit` with those before it (a chat's turn: with all around it)."""
        ids = self.encoder.text_ids(text)
        around = self.count(text) - len(ids) if self.encoder.chat else self.encoder.tokens_before
        kept = str(
            self.encoder.tokenizer.decode(
                ids[: limit - around], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
        # A cut inside a sign of several bytes leaves a replacement sign that the text does not have.
        return kept if text.startswith(kept) else kept.rstrip("\ufffd")

    def identity(self) -> list[Any]:
        """All that decides these numbers."""
        return self.encoder.identity()


def cut_middle(ids: list[int], room: int) -> list[int]:
    """Keep the beginning and the end of an over-long prompt: instructions stand at either."""
    if len(ids) <= room:
        return ids
    head = (room + 1) // 2
    return ids[:head] + ids[len(ids) - (room - head) :]


def _turns(example: Example) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": example.system}] if example.system else []
    for question, answer in example.shots:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*turns, {"role": "user", "content": example.prompt}]
