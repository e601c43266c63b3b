"""The server of `staple serve`: OpenAI's addresses before a policy.

A stream tells what each turn gives when the turn ends: an engine answers a batch as a whole.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from constitutions.errors import UserError
from models.serving.batching import Full
from models.serving.metrics import Metrics, Outcome
from models.serving.protocol import (
    ChatBody,
    Refusal,
    Replies,
    check_answered,
    event,
    parse_body,
)
from models.serving.turns import Asked, Conversation, Mode, Turn

LARGEST_BODY = 4 * 2**20
"""Most bytes of a request."""
T = TypeVar("T")
Event = tuple[int, Turn]
"""A choice's number, and its turn that has just ended."""
Handler = Callable[[HttpRequest], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What holds for a request that does not say otherwise."""

    mode: Mode
    temperature: float
    max_tokens: int
    threshold: float
    most_tokens: int
    """What no request may go beyond: a batch that has begun holds all others until it ends."""


@dataclass(frozen=True, kw_only=True)
class ChatServer:
    """A policy's answers under one model name.

    Args:
        modes: those that the policy has.
        key: what clients send as `Authorization: Bearer …`; None: nobody is asked for one, and only
            requests to a loopback name are answered, so that no page of a browser reaches it.
    """

    model: str
    conversation: Conversation
    modes: tuple[Mode, ...]
    defaults: Defaults
    metrics: Metrics
    key: SecretStr | None = None
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._admitted(self._metrics)),
                Route("/v1/models", self._admitted(self._models)),
                Route("/v1/chat/completions", self._admitted(self._complete), methods=["POST"]),
            ],
            exception_handlers={
                Refusal: self._refused,
                HTTPException: _no_such_address,
                Exception: _defect,
            },
        )

    # Addresses -----------------------------------------------------------------------------------

    async def _health(self, request: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: HttpRequest) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type=self.metrics.media_type)

    async def _models(self, request: HttpRequest) -> Response:
        card = {"id": self.model, "object": "model", "created": self.started, "owned_by": "staple"}
        return JSONResponse({"object": "list", "data": [card]})

    async def _complete(self, request: HttpRequest) -> Response:
        body = parse_body(await _read(request))
        asked, n = self._asked(body), body.n or 1
        replies = Replies(model=self.model, mode=asked.mode)
        events = self._events(asked, n)
        try:
            if not body.stream:
                return JSONResponse(await _unless_gone(request, _whole(events, replies, n)))
            first = await _unless_gone(request, anext(events))
        except _Gone:
            return Response(status_code=499)  # nobody reads it
        usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = _chunks(first, events, replies, usage=usage)
        how = {"Cache-Control": "no-cache"}
        return StreamingResponse(chunks, media_type="text/event-stream", headers=how)

    def _asked(self, body: ChatBody) -> Asked:
        """What a body asks for, with the defaults.

        Raises:
            Refusal: there is no such model, or the policy has no such mode.
        """
        mode = body.mode or self.defaults.mode
        if body.model != self.model:
            message = f"field 'model': got {body.model[:100]!r}; expected {self.model!r}"
            raise Refusal(404, message, param="model", code="model_not_found")
        if mode not in self.modes:
            expected = " or ".join(map(repr, self.modes))
            raise Refusal(400, f"field 'mode': got {mode!r}; expected {expected}", param="mode")
        own = self.defaults
        return Asked(
            messages=body.conversation,
            mode=mode,
            seed=secrets.randbits(31) if body.seed is None else body.seed,
            temperature=own.temperature if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            max_tokens=min(body.limit or own.max_tokens, own.most_tokens),
            stop=body.stops,
            threshold=own.threshold if body.threshold is None else body.threshold,
        )

    # Answers -------------------------------------------------------------------------------------

    async def _events(self, asked: Asked, n: int) -> AsyncIterator[Event]:
        """The turns of all choices as they end. Closed, it drops what has not begun.

        Raises:
            Refusal: a turn has no text, or the policy cannot answer.
        """
        found = asyncio.Queue[Event | None]()
        task = asyncio.create_task(self._answer(asked, n, found))
        task.add_done_callback(lambda _: found.put_nowait(None))
        began, outcome = time.monotonic(), Outcome.dropped
        try:
            while (ended := await found.get()) is not None:
                self.metrics.count(ended[1])
                check_answered(ended[1])
                yield ended
            await _explained(task)
            outcome = Outcome.answered
        except Refusal as refusal:
            outcome = Outcome.refused if refusal.status < 500 else Outcome.failed
            raise
        finally:
            task.cancel()
            self.metrics.ended(outcome, time.monotonic() - began)

    async def _answer(self, asked: Asked, n: int, found: asyncio.Queue[Event | None]) -> None:
        async def one(choice: int) -> None:
            async with aclosing(self.conversation.turns(asked, choice)) as turns:
                async for turn in turns:
                    found.put_nowait((choice, turn))

        async with asyncio.TaskGroup() as group:
            for choice in range(n):
                group.create_task(one(choice))

    # Who is answered -----------------------------------------------------------------------------

    def _admitted(self, handler: Handler) -> Handler:
        async def answer(request: HttpRequest) -> Response:
            self._check_key(request)
            return await handler(request)

        return answer

    def _check_key(self, request: HttpRequest) -> None:
        if self.key is None:
            if not is_loopback(_named(request.headers.get("host", ""))):
                raise Refusal(403, "without a key only requests to a loopback name are answered")
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        wanted = self.key.get_secret_value()
        if not hmac.compare_digest(given.encode(), wanted.encode()):
            expected = "expected the header 'Authorization: Bearer KEY' with the server's key"
            raise Refusal(401, f"the key is wrong or missing; {expected}", code="invalid_api_key")

    async def _refused(self, request: HttpRequest, refusal: Exception) -> Response:
        assert isinstance(refusal, Refusal), "it is registered for them"
        headers = {"Retry-After": str(refusal.after)} if refusal.after else None
        return JSONResponse(refusal.body, refusal.status, headers)


async def _no_such_address(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "it is registered for them"
    there = "/v1/chat/completions (POST), /v1/models, /health, /metrics"
    message = f"{error.detail}: {request.method} {request.url.path[:200]}; expected {there}"
    return JSONResponse(Refusal(error.status_code, message).body, error.status_code)


async def _defect(request: HttpRequest, error: Exception) -> Response:
    message = "the server failed; its log says more"
    return JSONResponse(Refusal(500, message, code="internal_error").body, 500)


async def _read(request: HttpRequest) -> bytes:
    """The body of a request.

    Raises:
        Refusal: it is not JSON by its type, or has more than `LARGEST_BODY` bytes.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site can send other types unasked
        raise Refusal(415, "expected the header 'Content-Type: application/json'")
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > LARGEST_BODY:
            raise Refusal(413, f"the body is too long; expected at most {LARGEST_BODY:,} bytes")
    return bytes(raw)


async def _explained(task: asyncio.Task[None]) -> None:
    """The end of a task.

    Raises:
        Refusal: why it failed, unless that is a defect of ours.
    """
    try:
        await task
    except ExceptionGroup as failed:  # the first failure has cancelled the other choices
        error = failed.exceptions[0]
        if isinstance(error, Full):
            raise Refusal(429, "too many requests wait; ask again later", after=1) from None
        if isinstance(error, UserError):
            raise Refusal(503, str(error), after=10) from None
        raise error from None


class _Gone(Exception):
    """The client has closed its connection."""


async def _unless_gone(request: HttpRequest, answer: Awaitable[T]) -> T:
    """The answer; it is cancelled when the client goes.

    Raises:
        _Gone: the client has gone.
    """
    wanted = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({wanted, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done():
            raise _Gone
        return wanted.result()
    finally:
        gone.cancel()
        if wanted.cancel():
            await asyncio.wait({wanted})


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(events: AsyncIterator[Event], replies: Replies, n: int) -> dict[str, Any]:
    choices: list[list[Turn]] = [[] for _ in range(n)]
    async for choice, turn in events:
        choices[choice].append(turn)
        replies.usage.add(turn)
    return replies.whole(choices)


async def _chunks(
    first: Event, events: AsyncIterator[Event], replies: Replies, *, usage: bool
) -> AsyncIterator[str]:
    """The events of a stream, from its first turn on; a failure after that is its last."""
    begun = set[int]()
    try:
        async for choice, turn in _after(first, events):
            replies.usage.add(turn)
            if choice not in begun:
                begun.add(choice)
                yield replies.chunk(choice, {"role": "assistant", "content": ""})
            yield replies.chunk(choice, replies.said(turn, turn.last))
            if turn.last:
                yield replies.chunk(choice, {}, turn.completion.finish)
    except Refusal as refusal:
        yield event(refusal.body)
        return
    if usage:
        yield replies.counted()
    yield event("[DONE]")


async def _after(first: Event, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    yield first
    async for later in events:
        yield later


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address, or the name "localhost"."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


def _named(header: str) -> str:
    """The host of a header "host:port"; "" where it is none."""
    with suppress(ValueError):
        return urlsplit(f"//{header}").hostname or ""
    return ""
