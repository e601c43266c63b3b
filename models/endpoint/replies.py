"""What an OpenAI-compatible server answers: texts, thoughts and counts, as servers differ in them.

`models/endpoint/client.py` reads replies as these; `models/endpoint/server.py` makes completions of
them.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

CHARACTERS = 4
"""A token has about so many, in English, where the server counts none."""


class _Part(BaseModel):
    """Of a message whose content is a list: a text, or thoughts."""

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
    """What an assistant says; servers with a reasoning parser tell its thoughts apart."""

    content: str | list[str | _Part] | None = None
    reasoning_content: Any = None
    reasoning: Any = None

    @property
    def said(self) -> str:
        return "".join(part.text or "" for part in self._parts if not part.thoughts)

    @property
    def thoughts(self) -> str:
        for told in (self.reasoning_content, self.reasoning):
            if isinstance(told, str) and told:
                return told
        return "".join(part.thoughts for part in self._parts)

    @property
    def _parts(self) -> list[_Part]:
        parts = self.content if isinstance(self.content, list) else [self.content or ""]
        return [_Part(text=part) if isinstance(part, str) else part for part in parts]


class _Token(BaseModel):
    logprob: float


class _Logprobs(BaseModel):
    """A chat has one in `content` for each token, a continued text in `token_logprobs`."""

    content: list[_Token] | None = None
    token_logprobs: list[float] | None = None


class ReplyChoice(BaseModel):
    """One answer: a chat's `message`, or the `text` that continues a given one."""

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
    def said(self) -> str:
        """Its text, as the server gives it."""
        return self.message.said if self.message else self.text or ""

    @property
    def thoughts(self) -> str:
        """What the server tells apart from the answer: without tags."""
        return self.message.thoughts if self.message else ""

    @property
    def token_logprobs(self) -> list[float]:
        """log p of each generated token (nats); empty where the server does not tell them."""
        try:
            told = _Logprobs.model_validate(self.logprobs)
        except ValidationError:
            return []
        return told.token_logprobs or [token.logprob for token in told.content or []]


class _Usage(BaseModel):
    completion_tokens: int = Field(ge=0)


class Reply(BaseModel):
    """What is read of a completion; a reply without it counts as a fault."""

    model: str | None = None
    choices: list[ReplyChoice] = Field(min_length=1)
    usage: _Usage | None = None

    @property
    def texts(self) -> list[str]:
        """What the choices say, thoughts included, without white space around it."""
        return [(choice.thoughts + choice.said).strip() for choice in self.choices]

    @property
    def tokens(self) -> int:
        """Generated tokens: as the server counts them, else one for each log-probability that it
        tells, else by the length: about four characters each."""
        if self.usage:
            return self.usage.completion_tokens
        told = [len(choice.token_logprobs) for choice in self.choices]
        lengths = [-(-len(text) // CHARACTERS) for text in self.texts]
        return sum(told if all(told) else lengths)
