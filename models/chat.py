"""Conversations as tokens, by a model's own chat template.

The engines ask it for prompts, `models/training/encoding.py` for training examples: one rendering
for both. What a person, a gold or a response says stays text: where it spells one of the
tokenizer's control tokens ("<|eot_id|>"), it becomes the words that it is, and ends no turn.

What ends a turn, and what stands around a thought, is derived from the template, by rendering it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from constitutions.errors import UserError
from models.policy import Message, Messages, PolicySettings
from models.thoughts import KNOWN, SplitText, Tags, tell_apart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = datetime(2024, 7, 26)
"""What a template that names the date is told. The real one would give other prompts, and so other
samples, after midnight; this is the day that Llama 3.1's template falls back to."""

_CLOCK = re.compile(r"""strftime_now\(\s*(['"])(?P<format>[^'"]*)\1\s*\)""")
"""Where a template asks transformers for the time; no other clock can be given to it."""


FAULTS = (
    ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError,
    NotImplementedError,
)  # fmt: skip
"""What a template, which is somebody else's program, can end in beside its own refusal."""


class ChatError(ValueError):
    """A conversation that cannot be rendered; the message is the reason."""


class Answered(NamedTuple):
    """Token ids: `prompt` is what the policy is given, `answer` what it says, its end included."""

    prompt: list[int]
    answer: list[int]


class _Form(NamedTuple):
    """What a template writes around the thoughts of an assistant's turn."""

    opening: str
    closing: str
    silent: str
    """What it writes where there are none."""


ASKED, SAID, AGAIN, LAST, THOUGHT = "Qaaq", "Abba", "Qbbq", "Acca", "Addda"
"""Contents of the turns that a template is tried on: letters that no template trims or writes."""


class Chat:
    """A tokenizer's chat template, with the arguments that the settings give it.

    A system turn goes into the first user turn where the template knows none.

    Raises:
        UserError: there is no template of the name that the settings give, or several and none
            that is called "default".
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: PolicySettings | None = None
    ) -> None:
        settings = settings or PolicySettings()
        self.tokenizer, self.arguments = tokenizer, dict(settings.template_arguments)
        template = _chosen(tokenizer, settings.chat_template)
        self.template = _CLOCK.sub(lambda m: repr(TODAY.strftime(m["format"])), template)
        self._tags = settings.thought_tags
        self._added = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}

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
        ids = self._apply(self._shown(messages), ask)
        self._check_answers(messages, ids)
        return ids

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

    # The end of a turn ---------------------------------------------------------------------

    @cached_property
    def end_of_turn(self) -> tuple[int, ...]:
        """The tokens that end an assistant's turn, up to the first control token among them.

        They are what the template writes after the last turn; else, where another turn follows at
        once, the token that begins that one (GLM); else the tokenizer's end of a text.

        Raises:
            ChatError: there is none; the template refuses a conversation, or drops what is said.
        """
        last, middle = self._tails
        for tail in (last, middle):
            ids = self._control(tail)
            place = next((i for i, token in enumerate(ids) if token in self._added), None)
            if place is not None and (tail is last or self._blank(ids[:place])):
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
        """The token that ends a turn, where it is one; none where there is no end at all."""
        try:
            end = self.end_of_turn[-1]
        except ChatError:
            return frozenset()
        ends_it = end in self._added or end == self.tokenizer.eos_token_id
        return frozenset({end} if ends_it else ())

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The end of a turn where the template spells it in ordinary tokens ("### End")."""
        try:
            spelt = not self.stop_tokens and bool(self.end_of_turn)
        except ChatError:
            return ()
        return (self._tails[0].strip(),) if spelt else ()

    @cached_property
    def _tails(self) -> tuple[str, str]:
        """What the template writes after the last assistant turn, and after one in the middle."""
        turns = [_user(ASKED), _assistant(SAID), _user(AGAIN), _assistant(LAST)]
        text = self._render(turns)
        places = [text.rfind(said) for said in (SAID, AGAIN, LAST)]
        if -1 in places or places != sorted(places):
            raise ChatError("the chat template drops what an assistant or a user says")
        said, again, last = places
        return text[last + len(LAST) :], text[said + len(SAID) : again]

    # Thoughts --------------------------------------------------------------------------------

    @cached_property
    def tags(self) -> Tags | None:
        """What stands around the model's thoughts: as set, else those of the usual ones that the
        template or the vocabulary has. None: it has none."""
        if isinstance(self._tags, tuple):
            return Tags(*self._tags)
        if self._tags == "none":
            return None
        own = self.tokenizer.get_added_vocab()
        return next(
            (t for t in KNOWN if t.close in self.template or {t.open, t.close} <= own.keys()), None
        )

    def opens_thought(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends inside a thought, which its template has opened."""
        if self.tags is None:
            return False
        room = len(self.tags.open.encode()) + 8
        return self._spelt(prompt[-room:]).rstrip().endswith(self.tags.open)

    def tell_apart(self, tokens: Sequence[int], *, opened: bool) -> SplitText:
        """Thoughts and answer of what was sampled, without the token that ended it.

        Args:
            opened: see `opens_thought`.
        """
        if self.tags is None:
            return SplitText("", self._said(tokens))
        told = tell_apart(self._spelt(tokens), self.tags, opened=opened)
        if not told.thoughts:
            return SplitText("", self._said(tokens))
        if not told.whole:
            return told
        low, high = 0, len(tokens)  # the answer's first token, by bisection
        while low < high:
            middle = (low + high) // 2
            closed = self.tags.close in self._spelt(tokens[:middle])
            low, high = (low, middle) if closed else (middle + 1, high)
        begun = self._spelt(tokens[:low]).partition(self.tags.close)[2]
        return told._replace(answer=(begun + self._said(tokens[low:])).lstrip())

    def answered(
        self, messages: Sequence[Message], text: str, thoughts: str | None = None
    ) -> Answered:
        """A prompt and its answer as the policy meets them: what was sampled, token for token.

        Where the template writes an answer just as it was sampled, its rendering is taken.

        Args:
            thoughts: what was sampled before the answer, as it was ("" if it was nothing), or a
                server's `reasoning_content`. None: nobody knows, or they are not to be shown; the
                answer then follows the template's own empty thought, which is part of the prompt.

        Raises:
            ChatError: the template refuses it, or has no end of a turn.
        """
        before, end = self.conversation(messages, ask=True), list(self.end_of_turn)
        opened = self.opens_thought(before)
        if self.tags and not thoughts and self.tags.close in text:  # they stand in the answer
            told = tell_apart(text, self.tags, opened=opened)
            thoughts, text = (told.thoughts, told.answer) if told.thoughts else (thoughts, text)
        if self.tags and thoughts:
            said = self._continued(thoughts, opened=opened) + text
            return Answered(before, self._thinking(said) + end)
        silent = self._form.silent if self.tags and (opened or thoughts is None) else ""
        if silent:
            return Answered(before + self._thinking(silent), self.words(text) + end)
        rendered = self._rendered(messages, text, before)
        return Answered(before, rendered or self.words(text) + end)

    def _check_answers(self, messages: Sequence[Message], ids: Sequence[int]) -> None:
        """Templates cut what stands before a closing tag: thoughts, but also an answer about it."""
        close = self.tags.close if self.tags else None
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        quoting = [text for text in said if close and close in text]
        if not quoting:
            return
        assert self.tags is not None
        opened = self.opens_thought(self._apply([_user(ASKED)], ask=True))
        shown = "".join(self._spelt(ids).split())
        for text in quoting:
            answer = tell_apart(text, self.tags, opened=opened).answer
            if "".join(answer.split()) not in shown:
                raise ChatError(f"the chat template cuts an answer with {close} in it")

    def _rendered(
        self, messages: Sequence[Message], text: str, before: list[int]
    ) -> list[int] | None:
        """The answer as the template writes it; None where that is not what was said."""
        try:
            through = self.conversation([*messages, _assistant(text)])
        except ChatError:
            return None
        ids, end = through[len(before) :], self.end_of_turn[-1]
        if through[: len(before)] != before or end not in ids:
            return None
        answer = ids[: ids.index(end) + 1]
        same = self._spelt(answer[:-1]).strip() == self._spelt(self.words(text)).strip()
        return answer if same else None

    def _continued(self, thoughts: str, *, opened: bool) -> str:
        """Thoughts as they follow the prompt: with their tags, the first only if it is due."""
        assert self.tags is not None
        opening, closing = self._form.opening, self._form.closing
        if self.tags.close not in thoughts:  # a server has taken them off
            thoughts = thoughts.strip("\n") + closing
        begun = thoughts.lstrip().startswith((self.tags.open, self.tags.close))
        if opened and begun:
            return thoughts.lstrip().removeprefix(self.tags.open).removeprefix("\n")
        return thoughts if opened or begun else opening + thoughts

    @cached_property
    def _form(self) -> _Form:
        """What the template writes around thoughts, or the usual where it does not show them."""
        assert self.tags is not None
        tags, asked = self.tags, [_user(ASKED)]
        before = self._render(asked, ask=True)
        opened = before.rstrip().endswith(tags.open)
        opening, closing = f"{tags.open}\n", f"\n{tags.close}\n\n"
        shown = self._tried(
            [*asked, cast(Message, {**_assistant(LAST), "reasoning_content": THOUGHT})]
        )
        head, thought, tail = shown.partition(THOUGHT)
        if thought and LAST in tail:
            closing = tail.partition(LAST)[0]
            opening = tags.open + head.rpartition(tags.open)[2]
        plain = self._tried([*asked, _assistant(LAST)])
        silent = plain[len(before) :].partition(LAST)[0] if plain.startswith(before) else ""
        if opened and tags.close not in silent:
            silent = closing
        return _Form(opening, closing, silent if silent.strip() else "")

    # Rendering -------------------------------------------------------------------------------

    def _thinking(self, text: str) -> list[int]:
        """Token ids of a text with thoughts in it: their tags are the tokenizer's own."""
        assert self.tags is not None
        special = self.tokenizer.all_special_tokens
        if not any(name in self.tags.open + self.tags.close for name in special):
            return self.words(text)
        place = text.find(self.tags.close) + len(self.tags.close)
        return self._control(text[:place]) + self.words(text[place:])

    def _control(self, text: str) -> list[int]:
        """Token ids of what a template writes: control tokens are what they spell."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)

    def _spelt(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))

    def _said(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _blank(self, tokens: Sequence[int]) -> bool:
        return not self._spelt(tokens).strip()

    def _shown(self, messages: Sequence[Message]) -> list[Message]:
        return list(messages) if self.has_system else fold_system(messages)

    def _tried(self, turns: Sequence[Message]) -> str:
        try:
            return self._render(turns)
        except ChatError:
            return ""

    def _render(self, turns: Sequence[Message], *, ask: bool = False) -> str:
        """The text of turns that are the project's own: nothing in them has to be broken."""
        return cast(str, self._template(turns, ask, tokenize=False))

    def _apply(self, turns: Sequence[Message], ask: bool) -> list[int]:
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
    """The template of that name; "default" unless one is given."""
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


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


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
