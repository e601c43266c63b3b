"""Conversations as tokens, by a model's own chat template.

The engines ask it for prompts, `models/encoding.py` for training examples: one rendering for both.
What a person, a gold or a response says stays text: where it spells one of the tokenizer's control
tokens ("<|eot_id|>"), it becomes the words that it is, and ends no turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, cast

from models.policy import Message, Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = datetime(2024, 7, 26)
"""What a template that names the date is told. The real one would give other prompts, and so other
samples, after midnight; this is the day that Llama 3.1's template falls back to."""

_CLOCK = re.compile(r"""strftime_now\(\s*(['"])(?P<format>[^'"]*)\1\s*\)""")
"""Where a template asks transformers for the time; no other clock can be given to it."""


class ChatError(ValueError):
    """A conversation that cannot be rendered; the message is the reason."""


class Chat:
    """A tokenizer's chat template.

    A system turn goes into the first user turn where the template knows none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        template = cast(str, tokenizer.chat_template or "")
        self.template = _CLOCK.sub(lambda m: repr(TODAY.strftime(m["format"])), template)

    def prompt(self, messages: Messages | str) -> list[int]:
        """Token ids of a conversation, up to where the assistant speaks next; of a raw text.

        Raises:
            ChatError: the template refuses it.
        """
        if isinstance(messages, str):  # begins as the tokenizer begins a text, with a bos or not
            return cast("list[int]", self.tokenizer(messages)["input_ids"])
        return self.conversation(messages, ask=True)

    def conversation(self, messages: Sequence[Message], *, ask: bool = False) -> list[int]:
        """Token ids of a conversation; `ask` ends it where the assistant speaks next.

        Raises:
            ChatError: the template refuses it.
        """
        return self._apply(list(messages) if self.has_system else fold_system(messages), ask)

    def words(self, text: str) -> list[int]:
        """Token ids of what an assistant says: no control token is among them."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    @cached_property
    def has_system(self) -> bool:
        """Whether the template shows what a system turn says."""
        user: Message = {"role": "user", "content": "?"}
        system: Message = {"role": "system", "content": "!"}
        try:
            return self._apply([system, user], ask=True) != self._apply([user], ask=True)
        except ChatError:
            return False

    def _apply(self, turns: Sequence[Message], ask: bool) -> list[int]:
        from jinja2 import TemplateError

        try:
            return cast(
                "list[int]",
                self.tokenizer.apply_chat_template(
                    cast("list[dict[str, str]]", list(turns)),
                    add_generation_prompt=ask,
                    return_dict=False,
                    sanitize_control_tokens=True,
                    chat_template=self.template,
                ),
            )
        except (TemplateError, ValueError, NotImplementedError) as error:
            raise ChatError(f"the chat template refuses it: {error}") from error


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
