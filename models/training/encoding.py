"""Turns conversations into training examples: tokens, and which of them count in the loss.

`tasks/train.py` and `tasks/sami` make examples with it; `models/training/loop.py` trains on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from models.chat import Answered, Chat
from models.chat_template import ChatError
from models.policy import Message, Messages, PolicySettings
from models.prompts import Templates, ask_refinement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One tokenised conversation."""

    ids: Sequence[int]
    trained: Sequence[bool]
    """Whether each token's prediction counts in the loss."""
    weight: float = 1.0
    """The trajectory's posterior weight, which multiplies its log-likelihood."""
    taught: Sequence[int] = ()
    """Where the example is distilled: the prompt after which the teacher predicts the trained
    tokens, which are the last."""

    @property
    def teacher(self) -> EncodedExample:
        """The trained tokens after the teacher's prompt."""
        answer = [i for i, trained in zip(self.ids, self.trained, strict=True) if trained]
        marks = (*(False,) * len(self.taught), *(True,) * len(answer))
        return EncodedExample((*self.taught, *answer), marks, self.weight)

    @property
    def tokens(self) -> int:
        """How many are processed, the teacher's included."""
        answer = int(np.sum(self.trained)) if len(self.taught) else 0
        return len(self.ids) + len(self.taught) + answer


@dataclass(frozen=True, slots=True)
class Group:
    """One query's prompts under C constitutions, and a response to each of them (SAMI)."""

    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    """The tokens that count, at least one each, with the end of the turn or without."""
    weight: float = 1.0
    reference: tuple[tuple[float, ...], ...] = ()
    """log p of each response's tokens under its own constitution (nats), by the policy at the start
    of the training; empty without a KL term."""

    @property
    def tokens(self) -> int:
        """The number of tokens in the C rows: each a prompt and all responses after it."""
        each = sum(len(response) - 1 for response in self.responses)
        return sum(map(len, self.prompts)) + len(self.prompts) * each


class EncodingError(ValueError):
    """A conversation cannot be trained on; the message says why."""


class Encoder:
    """Tokenises conversations by a chat template and marks the tokens that count in the loss.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        max_tokens: longer conversations are refused, because a cut one would teach cut answers.
        settings: which template is used, and its arguments.

    Raises:
        UserError: the tokenizer has no template of that name.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        settings: PolicySettings | None = None,
    ) -> None:
        self.chat, self.max_tokens = Chat(tokenizer, settings), max_tokens

    def encode(
        self,
        messages: Sequence[Message],
        trained: Sequence[int],
        weight: float = 1.0,
        thoughts: Mapping[int, str] | None = None,
    ) -> list[EncodedExample]:
        """The conversation with loss on some of its assistant turns, and on nothing else.

        The loss counts a turn's sampled tokens, thoughts included, and its end of turn, after the
        prompt from which they were sampled.

        Args:
            trained: indices of the assistant turns.
            thoughts: what was sampled before the answer, by the index of its turn, "" for nothing.
                A turn that is not in it follows the template's empty thought.

        Returns:
            One example; or one for each trained turn where a later prompt shows a turn differently
            (without its thoughts, say).

        Raises:
            EncodingError: the conversation is too long, the template refuses it, or a turn has no
                end.
        """
        known = thoughts or {}
        try:
            turns = [
                self.chat.answered(messages[:turn], messages[turn]["content"], known.get(turn))
                for turn in trained
            ]
            whole = self.chat.conversation(messages)
        except ChatError as error:
            raise EncodingError(str(error)) from error
        lines = [[*turn.prompt, *turn.answer] for turn in turns]
        for ids in (whole, max(lines, key=len)):
            if all(ids[: len(line)] == line for line in lines):
                return [self._example(ids, turns, weight)]
        return [
            self._example(line, [turn], weight) for line, turn in zip(lines, turns, strict=True)
        ]

    def distilled(
        self, prompt: Messages, teacher: Messages, text: str, weight: float = 1.0
    ) -> EncodedExample:
        """An answer to be distilled from a teacher's prompt, after the template's empty thought.

        Raises:
            EncodingError: as `encode`, of either prompt.
        """
        try:
            answered, informed = (self.chat.answered(each, text) for each in (prompt, teacher))
        except ChatError as error:
            raise EncodingError(str(error)) from error
        self._check([*informed.prompt, *answered.answer])
        example = self._example([*answered.prompt, *answered.answer], [answered], weight)
        return replace(example, taught=tuple(informed.prompt))

    def group(
        self, prompts: Sequence[Messages], responses: Sequence[str], ends: Sequence[bool]
    ) -> Group:
        """A group of prompts that differ in their constitution, with a response to each.

        A response counts without its thoughts, after the template's empty thought: thoughts quote
        the constitution, and would identify it by themselves.

        Args:
            ends: whether the tokens that end each response's turn count.

        Raises:
            EncodingError: a row is too long, the template refuses a conversation, or a response is
                empty and its end does not count.
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
        try:
            ids, answer = self.chat.answered(prompt, text)
        except ChatError as error:
            raise EncodingError(str(error)) from error
        written = self.chat.end_of_turn
        ended = len(written) if tuple(answer[-len(written) :]) == written else 1
        response = answer if end else answer[:-ended]
        if not response:
            raise EncodingError("a response is empty")
        return tuple(ids), tuple(response)

    def _example(self, ids: list[int], turns: Sequence[Answered], weight: float) -> EncodedExample:
        self._check(ids)
        trained = {len(prompt) + i for prompt, answer in turns for i in range(len(answer))}
        return EncodedExample(tuple(ids), tuple(i in trained for i in range(len(ids))), weight)

    def _check(self, ids: Sequence[int]) -> None:
        if len(ids) > self.max_tokens:
            raise EncodingError(f"{len(ids):,} tokens, more than max_tokens = {self.max_tokens:,}")


def check_template(
    tokenizer: PreTrainedTokenizerBase, settings: PolicySettings, templates: Templates
) -> Chat:
    """Try a model's chat template on the project's own conversations; no weights are loaded.

    The rendered conversation, with a system turn and follow-ups, must show every turn and end the
    assistant's turns. A training example must contain the answers' words, thoughts and ends.

    Returns:
        The template, whose `end_of_turn`, `stop_tokens` and `tags` are known.

    Raises:
        UserError: there is no template of the name that the settings give.
        ChatError, EncodingError: what the template refuses, drops or does not end.
    """
    encoder = Encoder(tokenizer, 1 << 30, settings)
    chat = encoder.chat
    end = chat.end_of_turn[-1]
    asked: Messages = (
        {"role": "system", "content": "Answer in plain words."},
        {"role": "user", "content": "How do I bake bread?"},
        {"role": "assistant", "content": "Do you have an oven?"},
        {"role": "user", "content": "Yes, a small one."},
    )
    texts = ("Mix flour with water.", "Name every quantity.", "Mix 500 g of flour with water.")
    thought = "The quantities are missing."
    last: Message = {"role": "assistant", "content": texts[-1]}
    turns = (*ask_refinement(templates, asked, texts[0], texts[1]), last)
    shown = _letters(tokenizer, chat.prompt(turns[:-1]))
    for turn in turns[:-1]:
        if _letters(tokenizer, chat.words(turn["content"])) not in shown:
            raise ChatError(f"the chat template drops what the {turn['role']} says before the end")
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"][-len(texts) :]
    known = {answers[-1]: thought if chat.tags else ""}
    wanted = [turns[i]["content"] for i in answers] + [thought] * bool(chat.tags)
    examples = encoder.encode(turns, answers, thoughts=known)
    learned = [[i for i, t in zip(e.ids, e.trained, strict=True) if t] for e in examples]
    if sum(ids.count(end) for ids in learned) < len(answers):
        raise EncodingError("the trained tokens lack an end of turn")
    read = "".join(_letters(tokenizer, ids) for ids in learned)
    for words in wanted:
        if _letters(tokenizer, chat.words(words)) not in read:
            raise EncodingError(f"the trained tokens lack an answer's own words ({words!r})")
    return chat


def _letters(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens without white space, which templates trim."""
    return "".join(str(tokenizer.decode(list(ids))).split())
