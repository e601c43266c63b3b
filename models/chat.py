"""Turns conversations into tokens by a model's own chat template, thoughts included.

Policies get their prompts from it and `models/training/encoding.py` its examples, so that training
and sampling see the same tokens. `models/chat_template.py` renders the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, cast

from models.chat_template import ASKED, LAST, THOUGHT, ChatError, ChatTemplate, fold_system
from models.policy import Message, Messages, PolicySettings, assistant, user
from models.thoughts import KNOWN, SplitText, Tags, split_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Answered(NamedTuple):
    """Token ids of a prompt, and of the answer to it with the end of its turn."""

    prompt: list[int]
    answer: list[int]


class _Form(NamedTuple):
    """What a template writes before and after an assistant's thoughts, and in place of none."""

    opening: str
    closing: str
    empty: str


class Chat(ChatTemplate):
    """A chat template whose model may think before it answers.

    Where the template shows no system turn, its text begins the first user turn.

    Raises:
        UserError: the template cannot be chosen, as in `ChatTemplate`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: PolicySettings | None = None
    ) -> None:
        super().__init__(tokenizer, settings)
        self._tags = (settings or PolicySettings()).thought_tags
        self._last: tuple[str, list[int]] = "", []

    def prompt(self, messages: Messages | str) -> list[int]:
        """Token ids of a conversation up to the assistant's next turn, or of a raw text.

        Raises:
            ChatError: the template refuses it.
        """
        if isinstance(messages, str):  # the tokenizer decides whether a bos token begins it
            return cast("list[int]", self.tokenizer(messages)["input_ids"])
        return self.conversation(messages, ask=True)

    def conversation(self, messages: Sequence[Message], *, ask: bool = False) -> list[int]:
        """Token ids of a conversation; `ask` ends it with the start of an assistant's turn.

        Raises:
            ChatError: the template refuses it.
        """
        key = repr((list(messages), ask))
        if self._last[0] != key:  # a training example is the last trained turn's conversation
            ids = self.apply(list(messages) if self.has_system else fold_system(messages), ask)
            self._check_answers(messages, ids)
            self._last = key, ids
        return list(self._last[1])

    # Thoughts --------------------------------------------------------------------------------

    @cached_property
    def tags(self) -> Tags | None:
        """The tags of the model's thoughts: those of the settings, or the usual ones that occur in
        the template or the vocabulary; None where the model has no thoughts."""
        if isinstance(self._tags, tuple):
            return Tags(*self._tags)
        if self._tags == "none":
            return None
        own = self.tokenizer.get_added_vocab()
        return next(
            (t for t in KNOWN if t.close in self.template or {t.open, t.close} <= own.keys()), None
        )

    def opens_thought(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends with the tag that opens a thought."""
        if self.tags is None:
            return False
        room = len(self.tags.open.encode()) + 8
        return self.decode(prompt[-room:], special=True).rstrip().endswith(self.tags.open)

    def split(self, tokens: Sequence[int], *, opened: bool) -> SplitText:
        """The thoughts and the answer of sampled tokens, given without the token that ended them.

        Args:
            opened: see `opens_thought`.
        """
        if self.tags is None:
            return SplitText("", self.decode(tokens, special=False))
        parts = split_text(self.decode(tokens, special=True), self.tags, opened=opened)
        if not parts.thoughts:
            return SplitText("", self.decode(tokens, special=False))
        if not parts.whole:
            return parts
        low, high = 0, len(tokens)  # the answer's first token, by bisection
        while low < high:
            middle = (low + high) // 2
            closed = self.tags.close in self.decode(tokens[:middle], special=True)
            low, high = (low, middle) if closed else (middle + 1, high)
        begun = self.decode(tokens[:low], special=True).partition(self.tags.close)[2]
        return parts._replace(answer=(begun + self.decode(tokens[low:], special=False)).lstrip())

    def answered(
        self, messages: Sequence[Message], text: str, thoughts: str | None = None
    ) -> Answered:
        """The tokens of a prompt, and those that were sampled after it.

        Args:
            text: the answer, or the whole sampled text.
            thoughts: what was sampled before the answer ("" for nothing), or a server's
                `reasoning_content`. None: unknown or left out; the answer then follows the
                template's own empty thought, which becomes part of the prompt.

        Raises:
            ChatError: the template refuses it, or has no end of a turn.
        """
        before, end = self.conversation(messages, ask=True), list(self.end_of_turn)
        opened = self.opens_thought(before)
        if self.tags and not thoughts and self.tags.close in text:  # the text contains them
            parts = split_text(text, self.tags, opened=opened)
            thoughts, text = (parts.thoughts, parts.answer) if parts.thoughts else (thoughts, text)
        if self.tags and thoughts:
            sampled = self._continued(thoughts, opened=opened) + text
            return Answered(before, self._thinking(sampled) + end)
        empty = self._form.empty if self.tags and (opened or thoughts is None) else ""
        if empty:
            return Answered(before + self._thinking(empty), self.words(text) + end)
        rendered = self._rendered(messages, text, before)
        return Answered(before, rendered or self.words(text) + end)

    def _check_answers(self, messages: Sequence[Message], ids: Sequence[int]) -> None:
        """Raise `ChatError` where the template cuts an answer because it quotes the closing tag."""
        close = self.tags.close if self.tags else None
        texts = [m["content"] for m in messages if m["role"] == "assistant"]
        quoting = [text for text in texts if close and close in text]
        if not quoting:
            return
        assert self.tags is not None
        opened = self.opens_thought(self.apply([user(ASKED)], ask=True))
        shown = "".join(self.decode(ids, special=True).split())
        for text in quoting:
            answer = split_text(text, self.tags, opened=opened).answer
            if "".join(answer.split()) not in shown:
                raise ChatError(f"the chat template cuts an answer with {close} in it")

    def _rendered(
        self, messages: Sequence[Message], text: str, before: list[int]
    ) -> list[int] | None:
        """The answer's tokens as the template renders them; None where it changes the text."""
        try:
            through = self.conversation([*messages, assistant(text)])
        except ChatError:
            return None
        ids, end = through[len(before) :], self.end_of_turn[-1]
        if through[: len(before)] != before or end not in ids:
            return None
        answer = ids[: ids.index(end) + 1]
        same = (
            self.decode(answer[:-1], special=True).strip()
            == self.decode(self.words(text), special=True).strip()
        )
        return answer if same else None

    def _continued(self, thoughts: str, *, opened: bool) -> str:
        """The thoughts with their tags, without the opening tag where the prompt ends with it."""
        assert self.tags is not None
        opening, closing = self._form.opening, self._form.closing
        if self.tags.close not in thoughts:  # a server has removed them
            thoughts = thoughts.strip("\n") + closing
        begun = thoughts.lstrip().startswith((self.tags.open, self.tags.close))
        if opened and begun:
            return thoughts.lstrip().removeprefix(self.tags.open).removeprefix("\n")
        return thoughts if opened or begun else opening + thoughts

    @cached_property
    def _form(self) -> _Form:
        """How the template writes thoughts; in the usual form where it leaves them out."""
        assert self.tags is not None
        tags, asked = self.tags, [user(ASKED)]
        before = self.render(asked, ask=True)
        opened = before.rstrip().endswith(tags.open)
        opening, closing = f"{tags.open}\n", f"\n{tags.close}\n\n"
        shown = self.rendered(
            [*asked, cast(Message, {**assistant(LAST), "reasoning_content": THOUGHT})]
        )
        head, thought, tail = shown.partition(THOUGHT)
        if thought and LAST in tail:
            closing = tail.partition(LAST)[0]
            opening = tags.open + head.rpartition(tags.open)[2]
        plain = self.rendered([*asked, assistant(LAST)])
        empty = plain[len(before) :].partition(LAST)[0] if plain.startswith(before) else ""
        if opened and tags.close not in empty:
            empty = closing
        return _Form(opening, closing, empty if empty.strip() else "")

    def _thinking(self, text: str) -> list[int]:
        """Token ids of a text that begins with thoughts, whose tags may be control tokens."""
        assert self.tags is not None
        special = self.tokenizer.all_special_tokens
        if not any(name in self.tags.open + self.tags.close for name in special):
            return self.words(text)
        place = text.find(self.tags.close) + len(self.tags.close)
        return self.markup(text[:place]) + self.words(text[place:])
