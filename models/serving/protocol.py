"""OpenAI's chat protocol: the body of a request, checked, and the bodies of replies.

Fields that would change the answer and are not served are refused, never ignored.
"""

from __future__ import annotations

import json
import reprlib
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.policy import NO_ANSWER, Message, Messages
from models.serving.turns import Mode, Role, Turn

MOST_CHOICES = 64
"""Most choices of a request (`n`)."""
MOST_STOPS = 16
MOST_TURNS = 1000
"""Most messages of a conversation."""
EXTENSION = "staple"
"""The field of a message with what is not OpenAI's: mode, first answer, principle."""
STATUS = {"overflow": 400, "refused": 400, "invalid": 500}
"""The HTTP status of an answer without a text, by its finish."""
TURN_NAMES: Mapping[Role, str] = {
    "initial": "first answer",
    "principle": "principle",
    "refined": "refined answer",
}


class Refusal(Exception):
    """A request that is not answered, as OpenAI's clients read it.

    Args:
        status: the HTTP status.
        param: the field that is wrong.
        code: what programs compare, such as "model_not_found".
        after: seconds after which the client may ask again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        after: int | None = None,
    ) -> None:
        self.status, self.message, self.after = status, message, after
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        super().__init__(message)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class _Said(BaseModel):
    """A message. `developer` is what OpenAI calls the system's turn of later models."""

    model_config = ConfigDict(extra="ignore", strict=True)  # replies that come back have more

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    @property
    def message(self) -> Message:
        whole = self.content
        text = whole if isinstance(whole, str) else "".join(part.text for part in whole)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


class _Text(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]


NOT_SERVED = ("frequency_penalty", "presence_penalty", "logprobs", "tools", "logit_bias")
"""Fields that may be given if they ask for nothing."""


class ChatBody(BaseModel):
    """The body of a chat completion."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    messages: list[_Said] = Field(min_length=1, max_length=MOST_TURNS)
    mode: Mode | None = None
    """Not OpenAI's: what is answered. Unset: what the server was started with."""
    threshold: float | None = Field(None, ge=0, le=1)
    """Not OpenAI's: the least probability of keeping a first answer at which mode gated gives it.
    """
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1, le=1 << 20)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 20)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    # what must be left out, or say nothing
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logprobs: bool | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    logit_bias: dict[str, float] | None = None
    response_format: _Text | None = None
    # what says who asks, and changes no answer
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    parallel_tool_calls: Any = None

    @model_validator(mode="after")
    def _is_served(self) -> ChatBody:
        for name in NOT_SERVED:
            if getattr(self, name):
                raise ValueError(f"{name}: nothing: it is not served")
        if self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice: nothing: it is not served")
        if self.messages[-1].role != "user":
            raise ValueError("messages: a conversation whose last message is the user's")
        if not all(self.stops) or len(self.stops) > MOST_STOPS:
            raise ValueError(f"stop: at most {MOST_STOPS} texts, none of them empty")
        return self

    @property
    def conversation(self) -> Messages:
        """The messages as a policy reads them."""
        return tuple(said.message for said in self.messages)

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer, under either of OpenAI's names."""
        return self.max_completion_tokens or self.max_tokens


def parse_body(raw: bytes) -> ChatBody:
    """The body of a request.

    Raises:
        Refusal: a field is wrong; the message names it, what it is and what is expected.
    """
    try:
        return ChatBody.model_validate_json(raw)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> Refusal:
    first = error.errors(include_url=False, include_context=False)[0]
    message = str(first["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    place = [str(part) for part in first["loc"] if _is_field(part)]
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is not valid JSON: {message}; expected a JSON object")
    if first["type"] == "value_error":
        name, _, expected = message.partition(": ")
        return Refusal(400, f"field '{name}': expected {expected}", param=name)
    param = ".".join(place)
    where = f"field '{param}'" if param else "the body"
    if first["type"] == "extra_forbidden":
        known = ", ".join(ChatBody.model_fields)
        return Refusal(400, f"{where}: it is not known; expected {known}", param=param)
    if first["type"] == "missing":
        return Refusal(400, f"{where}: it is missing", param=param)
    got = reprlib.repr(first["input"])
    return Refusal(400, f"{where}: got {got}; expected {message}", param=param or None)


def _is_field(part: int | str) -> bool:
    """Whether a part of an error's place is a field or an index, not a type of a union."""
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "float", "int"))


# Replies ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Usage:
    """Tokens of all turns of all choices."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, turn: Turn) -> None:
        self.prompt_tokens += turn.prompt_tokens
        self.completion_tokens += turn.completion.tokens

    @property
    def body(self) -> dict[str, int]:
        """As OpenAI's `usage`."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Replies:
    """The bodies of one request's reply, whole or in chunks."""

    model: str
    mode: Mode
    usage: Usage = field(default_factory=Usage)
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Sequence[Turn]]) -> dict[str, Any]:
        """The reply with all choices, each given by its turns."""
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(i, turns) for i, turns in enumerate(choices)],
            "usage": self.usage.body,
        }

    def chunk(self, choice: int, delta: Mapping[str, Any], finish: str | None = None) -> str:
        """An event of a stream: what a choice's message gains."""
        one = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**self._head("chat.completion.chunk"), "choices": [one]})

    def counted(self) -> str:
        """The event of a stream that tells its usage."""
        head = self._head("chat.completion.chunk")
        return event({**head, "choices": [], "usage": self.usage.body})

    def said(self, turn: Turn, last: bool) -> dict[str, Any]:
        """What a turn adds to a message: an answer its content, another turn the extension."""
        if not last:
            return {EXTENSION: {_extended(turn.role): turn.completion.text}}
        thoughts = turn.completion.thoughts
        more = {"reasoning_content": thoughts} if thoughts else {}
        return {"content": turn.completion.text, **more}

    def _choice(self, index: int, turns: Sequence[Turn]) -> dict[str, Any]:
        *before, last = turns
        own = {"mode": self.mode, **{_extended(t.role): t.completion.text for t in before}}
        message = {"role": "assistant", **self.said(last, last=True), EXTENSION: own}
        finish = last.completion.finish
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _extended(role: Role) -> str:
    return TURN_NAMES[role].replace(" ", "_")


def event(body: Mapping[str, Any] | str) -> str:
    """A server-sent event."""
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
    return f"data: {text}\n\n"


def check_answered(turn: Turn) -> None:
    """Raises Refusal: the turn has no text."""
    if turn.missing is None:
        return
    what = f"the {TURN_NAMES[turn.role]} has no text: {NO_ANSWER[turn.missing]}"
    if turn.missing == "overflow":
        fix = "expected shorter messages or a smaller max_tokens"
        code = "context_length_exceeded"
        raise Refusal(400, f"{what}; {fix}", param="messages", code=code)
    raise Refusal(STATUS[turn.missing], what, param="messages")
