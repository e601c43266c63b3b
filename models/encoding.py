"""Conversations as training examples: tokens, and which of them the loss is on.

`tasks/train.py` and `tasks/sami` encode with it; `models/training.py` trains on what it makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.chat import Chat, ChatError
from models.policy import Message, Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised conversation. `trained[i]` says whether token i is predicted in the loss."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    weight: float = 1.0
    """Posterior weight of the trajectory: multiplies its log-likelihood."""


@dataclass(frozen=True, slots=True)
class Group:
    """One query's C prompts, each under a constitution of its own, and the C responses (SAMI)."""

    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    """The tokens that count, at least one each: with the end of the turn, or without."""
    weight: float = 1.0
    reference: tuple[tuple[float, ...], ...] = ()
    """log p of each response's tokens under its own constitution, by the policy that is not to be
    left far behind; empty without a KL term."""

    @property
    def tokens(self) -> int:
        """Tokens of the C rows: a prompt, and every response after it."""
        each = sum(len(response) - 1 for response in self.responses)
        return sum(map(len, self.prompts)) + len(self.prompts) * each


class EncodingError(ValueError):
    """A conversation that cannot be trained on; the message is the reason."""


class Encoder:
    """Tokenises conversations with a chat template and marks the tokens that are trained.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        max_tokens: longer conversations are refused: a cut one would teach cut answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.chat, self.max_tokens = Chat(tokenizer), max_tokens
        self.added = set(tokenizer.get_added_vocab().values())

    def encode(
        self, messages: Sequence[Message], trained: Sequence[int], weight: float = 1.0
    ) -> list[Example]:
        """The conversation with loss on the assistant turns numbered `trained`, nothing else.

        The loss is on a turn's tokens and its end-of-turn token. A template that renders a
        turn differently once others follow (one that drops earlier reasoning, say) gives one
        example per trained turn, each as the policy saw it; otherwise there is one example.

        Raises:
            EncodingError: too long, a conversation that the template refuses, or a turn without
                an end token.
        """
        try:
            whole = self.chat.conversation(messages)
            spans = [self._span(messages, turn) for turn in trained]
        except ChatError as error:
            raise EncodingError(str(error)) from error
        if all(_begins(whole, through) for _, through in spans):
            return [self._example(whole, spans, weight)]
        return [self._example(through, [(start, through)], weight) for start, through in spans]

    def group(
        self, prompts: Sequence[Messages], responses: Sequence[str], ends: Sequence[bool]
    ) -> Group:
        """Prompts that differ in their constitution, and a response to each.

        Args:
            ends: of each response, whether the token that ends the turn counts. (It says that
                nothing follows.)

        Raises:
            EncodingError: a row is too long, a conversation that the template refuses, an empty
                response where the end does not count.
        """
        rows = [self._answered(*row) for row in zip(prompts, responses, ends, strict=True)]
        group = Group(tuple(p for p, _ in rows), tuple(r for _, r in rows))
        longest = max(len(p) for p in group.prompts) + max(len(r) for r in group.responses)
        if longest > self.max_tokens:
            raise EncodingError(f"{longest:,} tokens, more than max_tokens = {self.max_tokens:,}")
        return group

    def _answered(
        self, prompt: Messages, text: str, end: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        messages = (*prompt, Message(role="assistant", content=text))
        try:
            start, through = self._span(messages, len(prompt))
            stop = self._end(through, start) - (not end)
        except ChatError as error:
            raise EncodingError(str(error)) from error
        if stop <= start:
            raise EncodingError("a response is empty")
        return tuple(through[:start]), tuple(through[start:stop])

    def _span(self, messages: Sequence[Message], turn: int) -> tuple[int, list[int]]:
        """Where a turn's first token stands, and the conversation up to the turn's end."""
        before = self.chat.conversation(messages[:turn], ask=True)
        through = self.chat.conversation(messages[: turn + 1])
        if not _begins(through, before):
            raise EncodingError(
                "the chat template renders a prompt differently once it is answered"
            )
        return len(before), through

    def _example(
        self, ids: list[int], spans: Sequence[tuple[int, list[int]]], weight: float
    ) -> Example:
        if len(ids) > self.max_tokens:
            raise EncodingError(f"{len(ids):,} tokens, more than max_tokens = {self.max_tokens:,}")
        trained = {i for start, through in spans for i in range(start, self._end(through, start))}
        return Example(tuple(ids), tuple(i in trained for i in range(len(ids))), weight)

    def _end(self, through: list[int], start: int) -> int:
        """After the turn's end token (a line break may follow it)."""
        ends = [i for i, token in enumerate(through) if i >= start and token in self.added]
        if not ends:
            raise EncodingError("the chat template ends no assistant turn with a token of its own")
        return ends[-1] + 1


def _begins(ids: list[int], start: list[int]) -> bool:
    return ids[: len(start)] == start
