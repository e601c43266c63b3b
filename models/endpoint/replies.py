"""Parses replies of OpenAI-compatible servers, which send texts, thoughts and counts differently.

`models/endpoint/client.py` parses them; `models/endpoint/server.py` makes completions of them.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

CHARACTERS = 4
"""Mean characters of a token in English: the estimate for servers that count no tokens."""


class _Part(BaseModel):
    """A text or thoughts, in a message whose content is a list."""

    type: str = "text"
    text: str | None = None
    thinking: str | list[_Part] | None = None

    @property
    def thoughts(self) -> str:
        inside = self.thinking if self.thinking is not None else ""
        if isinstance(inside, list):
            return "".join(part.text or "" for part in inside)
        return inside or (self.text or "" if self.type in ("thinking", "reasoning") else "")


class _Message(BaseModel):
    """An assistant's message; servers with a reasoning parser send its thoughts separately."""

    content: str | list[str | _Part] | None = None
    reasoning_content: Any = None
    reasoning: Any = None

    @property
    def answer(self) -> str:
        return "".join(part.text or "" for part in self._parts if not part.thoughts)

    @property
    def thoughts(self) -> str:
        for given in (self.reasoning_content, self.reasoning):
            if isinstance(given, str) and given:
                return given
        return "".join(part.thoughts for part in self._parts)

    @property
    def _parts(self) -> list[_Part]:
        parts = self.content if isinstance(self.content, list) else [self.content or ""]
        return [_Part(text=part) if isinstance(part, str) else part for part in parts]


class _Token(BaseModel):
    logprob: float


class _Logprobs(BaseModel):
    """A chat has them in `content`, a continued text in `token_logprobs`; one for each token."""

    content: list[_Token] | None = None
    token_logprobs: list[float] | None = None


class ReplyChoice(BaseModel):
    """One answer: a chat's `message`, or the `text` that continues a given text."""

    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: Any = None

    @model_validator(mode="after")
    def _is_an_answer(self) -> ReplyChoice:
        if self.message is None and self.text is None:
            raise ValueError("neither a message nor a text")
        return self

    @property
    def answer(self) -> str:
        """The answer's text, as the server sends it."""
        return self.message.answer if self.message else self.text or ""

    @property
    def thoughts(self) -> str:
        """The thoughts that the server has separated from the answer, without tags; else ""."""
        return self.message.thoughts if self.message else ""

    @property
    def token_logprobs(self) -> list[float]:
        """log p of each generated token (nats); empty where the server sends none."""
        try:
            given = _Logprobs.model_validate(self.logprobs)
        except ValidationError:
            return []
        return given.token_logprobs or [token.logprob for token in given.content or []]


class _Usage(BaseModel):
    completion_tokens: int = Field(ge=0)


class Reply(BaseModel):
    """A reply with completions; one without these fields is a `Fault`."""

    model: str | None = None
    choices: list[ReplyChoice] = Field(min_length=1)
    usage: _Usage | None = None

    @property
    def texts(self) -> list[str]:
        """The choices' texts, thoughts included, without white space around them."""
        return [(choice.thoughts + choice.answer).strip() for choice in self.choices]

    @property
    def tokens(self) -> int:
        """The number of generated tokens: the server's count, or the number of log-probabilities,
        or the number of characters divided by `CHARACTERS`."""
        if self.usage:
            return self.usage.completion_tokens
        given = [len(choice.token_logprobs) for choice in self.choices]
        lengths = [-(-len(text) // CHARACTERS) for text in self.texts]
        return sum(given if all(given) else lengths)
