"""A model's own chat template: how it renders conversations and ends a turn.

`models/chat.py` adds thoughts. Prompts, golds and responses stay plain text: one that spells a
control token ("<|eot_id|>") is encoded as ordinary words, and so ends no turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from constitutions.errors import UserError
from models.policy import Message, PolicySettings, assistant, user

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = datetime(2024, 7, 26)
"""The date that templates write. With the real date, prompts and samples would change at midnight;
Llama 3.1's template falls back to this day."""

_CLOCK = re.compile(r"""strftime_now\(\s*(['"])(?P<format>[^'"]*)\1\s*\)""")
"""A template's call for the date; transformers offers no way to set its clock."""
FAULTS = (
    ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError,
    NotImplementedError,
)  # fmt: skip
"""Errors of a template, beside its own refusals: it is a program that somebody else wrote."""


class ChatError(ValueError):
    """A conversation cannot be rendered; the message says why."""


ASKED, SAID, AGAIN, LAST, THOUGHT = "Qaaq", "Abba", "Qbbq", "Acca", "Addda"
"""Contents of trial turns: letters that no template trims or writes by itself."""


class ChatTemplate:
    """A tokenizer's chat template, with the arguments that the settings give it.

    Raises:
        UserError: no template has the name that the settings give, or there are several without a
            "default".
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: PolicySettings | None = None
    ) -> None:
        settings = settings or PolicySettings()
        self.tokenizer, self.arguments = tokenizer, dict(settings.template_arguments)
        template = _chosen(tokenizer, settings.chat_template)
        self.template = _CLOCK.sub(lambda m: repr(TODAY.strftime(m["format"])), template)
        self._added = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}

    def words(self, text: str) -> list[int]:
        """Token ids of an assistant's text; no control token is among them."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    @cached_property
    def has_system(self) -> bool:
        """Whether the template shows a system turn."""
        system: Message = {"role": "system", "content": "!"}
        try:
            return self.apply([system, user("?")], ask=True) != self.apply([user("?")], ask=True)
        except ChatError:
            return False

    @cached_property
    def end_of_turn(self) -> tuple[int, ...]:
        """The tokens that end an assistant's turn, up to the first control token among them.

        They are what the template writes after the last turn. Where it writes nothing there, they
        are the token that begins the next turn (GLM), or else the tokenizer's end of a text.

        Raises:
            ChatError: there is no end, or the template refuses a conversation or drops a turn.
        """
        last, middle = self._tails
        for tail in (last, middle):
            ids = self.markup(tail)
            place = next((i for i, token in enumerate(ids) if token in self._added), None)
            blank = not self.decode(ids[:place], special=True).strip()
            if place is not None and (tail is last or blank):
                return tuple(ids[: place + 1])
        if last.strip():
            return tuple(self.words(last.rstrip()))
        if self.tokenizer.eos_token_id is None:
            raise ChatError(
                "the chat template ends no assistant turn with a token of its own, and the "
                "tokenizer names no end of a text (eos_token)"
            )
        return (int(cast(int, self.tokenizer.eos_token_id)),)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The token that ends a turn; empty where a turn ends with text or without an end."""
        try:
            end = self.end_of_turn[-1]
        except ChatError:
            return frozenset()
        ends_it = end in self._added or end == self.tokenizer.eos_token_id
        return frozenset({end} if ends_it else ())

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The text that ends a turn ("### End"); empty where a token ends it."""
        try:
            spelt = not self.stop_tokens and bool(self.end_of_turn)
        except ChatError:
            return ()
        return (self._tails[0].strip(),) if spelt else ()

    @cached_property
    def _tails(self) -> tuple[str, str]:
        """What the template writes after the last assistant turn, and after one in the middle."""
        turns = [user(ASKED), assistant(SAID), user(AGAIN), assistant(LAST)]
        text = self.render(turns)
        places = [text.rfind(text_) for text_ in (SAID, AGAIN, LAST)]
        if -1 in places or places != sorted(places):
            raise ChatError("the chat template drops what an assistant or a user says")
        middle, again, last = places
        return text[last + len(LAST) :], text[middle + len(SAID) : again]

    # Rendering -------------------------------------------------------------------------------

    def markup(self, text: str) -> list[int]:
        """Token ids of the template's own text, in which control tokens count."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)

    def decode(self, tokens: Sequence[int], *, special: bool) -> str:
        """The text of tokens, with the special ones or without."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=not special))

    def render(self, turns: Sequence[Message], *, ask: bool = False) -> str:
        """The text of turns; control tokens in their contents stay whole, so give no foreign ones.

        Raises:
            ChatError: the template refuses them.
        """
        return cast(str, self._template(turns, ask, tokenize=False))

    def rendered(self, turns: Sequence[Message]) -> str:
        """The result of `render`; "" where the template refuses the turns."""
        try:
            return self.render(turns)
        except ChatError:
            return ""

    def apply(self, turns: Sequence[Message], ask: bool) -> list[int]:
        """Token ids of turns; control tokens in their contents become ordinary words.

        Raises:
            ChatError: the template refuses them.
        """
        made = self._template(turns, ask, tokenize=True, sanitize_control_tokens=True)
        return cast("list[int]", made)

    def _template(self, turns: Sequence[Message], ask: bool, **how: bool) -> object:
        from jinja2 import TemplateError

        try:
            return cast(Any, self.tokenizer).apply_chat_template(
                list(turns),
                add_generation_prompt=ask,
                return_dict=False,
                chat_template=self.template,
                **how,
                **self.arguments,
            )
        except (TemplateError, *FAULTS) as error:
            raise ChatError(f"the chat template refuses it: {error}") from error


def _chosen(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str:
    """The tokenizer's template of that name; None: "default"."""
    found = tokenizer.chat_template
    named = found if isinstance(found, dict) else {"default": found or ""}
    if (name or "default") in named:
        return cast(str, named[name or "default"])
    listed = ", ".join(sorted(named))
    raise UserError(
        f"there is no chat template called {name!r}"
        if name
        else "the tokenizer has several chat templates, and none is called 'default'",
        where="setting 'policy.chat_template'",
        expected=f"one of {listed}",
        fix=f"--set policy.chat_template={sorted(named)[0]}",
    )


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """The conversation without system turns: their texts begin the first user turn."""
    texts = [m["content"] for m in messages if m["role"] == "system"]
    others = [m for m in messages if m["role"] != "system"]
    if not texts:
        return others
    if not others or others[0]["role"] != "user":
        return [{"role": "user", "content": "\n\n".join(texts)}, *others]
    first: Message = {"role": "user", "content": "\n\n".join([*texts, others[0]["content"]])}
    return [first, *others[1:]]
