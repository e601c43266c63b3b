"""Conversations as tokens, by a model's own chat template.

The engines ask it for prompts, `models/encoding.py` for training examples: one rendering for both.
What a person, a gold or a response says stays text: where it spells one of the tokenizer's control
tokens ("<|eot_id|>"), it is tokenised as the words that it is, and ends no turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from models.foreign_text import disarm
from models.policy import Message, Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = datetime(2024, 7, 26)
"""What a template that names the date is told. The real one would give other prompts, and so other
samples, after midnight; this is the day that Llama 3.1's template falls back to."""

Tokens = tuple[list[int], list[int]]
"""Token ids, and the character at which each one starts."""

_PLACEHOLDERS = 0xF0000
"""The first of the characters (of a plane for private use) that stand for control tokens."""


class ChatError(ValueError):
    """A conversation that cannot be rendered; the message is the reason."""


class Chat:
    """A tokenizer's chat template.

    A system turn goes into the first user turn where the template knows none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        unknown = tokenizer.unk_token
        self._control = sorted(
            {t for t in tokenizer.all_special_tokens if t and t != unknown}, key=len, reverse=True
        )
        self._any_control = re.compile("|".join(map(re.escape, self._control)) or r"(?!)")
        last = chr(_PLACEHOLDERS + len(self._control))
        self._any_placeholder = re.compile(f"[{chr(_PLACEHOLDERS)}-{last}]")

    def prompt(self, messages: Messages | str) -> list[int]:
        """Token ids of a conversation, up to where the assistant speaks next; of a raw text.

        Raises:
            ChatError: the template refuses it.
        """
        if isinstance(messages, str):  # begins as the tokenizer begins a text, with a bos or not
            return cast("list[int]", self.tokenizer(messages)["input_ids"])
        return self.tokens(self.render(messages, ask=True))[0]

    def text(self, messages: Messages) -> str:
        """The conversation as the model reads it, for people and for servers of raw text."""
        return self._restored(self.render(messages, ask=True))

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The conversation for `tokens`; `ask` ends it where the assistant speaks next.

        Control tokens in what was said stand in it as placeholders, of one character each.

        Raises:
            ChatError: the template refuses it.
        """
        turns = list(messages) if self.has_system else fold_system(messages)
        return self._apply([{**t, "content": self._hidden(t["content"])} for t in turns], ask)

    def tokens(self, rendered: str) -> Tokens:
        """Token ids, and the character of the rendered conversation at which each one starts."""
        if not self._any_placeholder.search(rendered):
            return self._plain(rendered)
        ids: list[int] = []
        starts: list[int] = []
        for at, piece in self._pieces(rendered):
            found, places = self._token(piece) or self._words(piece)
            ids += found
            starts += [at + place for place in places]
        return ids, starts

    def words(self, text: str) -> list[int]:
        """Token ids of what an assistant says: no control token is among them."""
        return self._words(self._hidden(text))[0] if text else []

    @cached_property
    def has_system(self) -> bool:
        """Whether the template shows what a system turn says."""
        probe: list[dict[str, str]] = [
            {"role": "system", "content": "7f3a"},
            {"role": "user", "content": "?"},
        ]
        try:
            return "7f3a" in self._apply(probe, ask=True)
        except ChatError:
            return False

    def _apply(self, turns: Sequence[Any], ask: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    cast("list[dict[str, str]]", list(turns)),
                    tokenize=False,
                    add_generation_prompt=ask,
                    strftime_now=TODAY.strftime,
                )
            )
        except TemplateError as error:
            raise ChatError(f"the chat template refuses it: {error}") from error

    def _hidden(self, text: str) -> str:
        """Control tokens as placeholders; where they cannot be kept, with a space inside."""
        if not self._any_control.search(text):
            return text
        if not self._keeps_text:
            return disarm(text, self._control)
        return self._any_control.sub(lambda m: chr(_PLACEHOLDERS + self._control.index(m[0])), text)

    def _restored(self, text: str) -> str:
        return "".join(map(self._spelt, text))

    def _spelt(self, character: str) -> str:
        known = self._is_placeholder(character)
        return self._control[ord(character) - _PLACEHOLDERS] if known else character

    def _is_placeholder(self, character: str) -> bool:
        return 0 <= ord(character) - _PLACEHOLDERS < len(self._control)

    def _pieces(self, text: str) -> list[tuple[int, str]]:
        """(start, piece): control tokens, and what stands between them."""
        edges = {edge for m in self._any_control.finditer(text) for edge in m.span()}
        return [(a, text[a:b]) for a, b in pairwise(sorted({0, len(text), *edges}))]

    def _token(self, piece: str) -> Tokens | None:
        """A piece that is a control token of the template's own."""
        if piece not in self._control:
            return None
        return [cast(int, self.tokenizer.convert_tokens_to_ids(piece))], [0]

    def _words(self, piece: str) -> Tokens:
        """A piece between control tokens: whatever it spells is words."""
        origin = [i for i, c in enumerate(piece) for _ in self._spelt(c)]
        ids, starts = self._plain(self._restored(piece), split_special_tokens=True)
        return ids, [origin[start] for start in starts]

    def _plain(self, text: str, **how: Any) -> Tokens:
        # The template writes every special token itself, the first one included.
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **how)
        offsets = cast("list[tuple[int, int]]", encoded["offset_mapping"])
        return cast("list[int]", encoded["input_ids"]), [start for start, _ in offsets]

    @cached_property
    def _keeps_text(self) -> bool:
        """Whether the pieces between control tokens can be tokenised by themselves.

        Tokenizers that put a space before each text ("▁") cannot: found by trying.
        """
        try:
            text = self._apply([{"role": "user", "content": "a b\n c"}], ask=True)
        except ChatError:
            return False
        apart = [self._token(piece) or self._words(piece) for _, piece in self._pieces(text)]
        spelt = all(len(self._words(token)[0]) > 1 for token in self._control if len(token) > 1)
        return spelt and [i for ids, _ in apart for i in ids] == self._plain(text)[0]


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """The conversation without system turns: what they say begins the first user turn."""
    said = [m["content"] for m in messages if m["role"] == "system"]
    others = [m for m in messages if m["role"] != "system"]
    if not said:
        return others
    if not others or others[0]["role"] != "user":
        return [{"role": "user", "content": "\n\n".join(said)}, *others]
    first: Message = {"role": "user", "content": "\n\n".join([*said, others[0]["content"]])}
    return [first, *others[1:]]
