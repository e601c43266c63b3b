"""Sends requests to an OpenAI-compatible server, again and again until it answers or time is up.

`models.endpoint.server` makes a policy of it. A request fails in one of three ways, and a `Fault`
says in which:

- the server is busy or away (408, 425, 429, 5xx, a timeout, a broken connection, an unreadable
  reply): the request is sent again, with exponential back-off and jitter, for `Limits.patience`;
- the request is too long (`Fault.too_long`): it is not sent again;
- any other fault is final, too.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, SecretStr, ValidationError

from constitutions.errors import UserError
from models.endpoint.address import base_url, has_port, key_in
from models.endpoint.faults import BUSY, Fault, error_of, retry_after
from models.endpoint.proxies import proxy_of
from models.endpoint.replies import Reply
from models.policy import Argument, PolicySettings

LARGEST_REPLY = 16 * 2**20
"""Most bytes of a reply: 64 completions of 16,000 tokens have about 4 MiB."""
SECRET_LENGTH = 12
"""Least characters of a secret key: a shorter one ("EMPTY") may occur in a completion."""
_log = logging.getLogger(__name__)
for _name in ("httpx", "httpcore"):  # they log what a server sends, even an echoed key
    logging.getLogger(_name).setLevel(logging.WARNING)
T = TypeVar("T")
Parsed = TypeVar("Parsed", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many requests a server gets at once, and for how long. Times are in seconds."""

    in_flight: int = 32
    """Most requests at once."""
    timeout: float = 600.0
    """The time of one attempt, to the last byte of the reply: answers are not streamed."""
    patience: float = 1200.0
    """How long a request is sent again, for instance while the server restarts."""
    start: float = 90.0
    """`patience` of the first requests, and of those that ask whether the server still answers."""
    backoff: float = 1.0
    """The first pause between attempts; each one is up to twice the last one."""
    longest_backoff: float = 60.0


class Card(BaseModel):
    """A model that a server lists; an adapter names its base as `parent`."""

    id: str
    root: str | None = None
    parent: str | None = None


class _Cards(BaseModel):
    data: list[Card]


class Endpoint:
    """A server over HTTP(S), certificates verified, no redirects. It never shows its key.

    Raises:
        UserError: the endpoint is not a plain http(s) address, or its proxy cannot be used.
    """

    def __init__(
        self,
        address: str,
        *,
        key: SecretStr | None = None,
        key_variable: str | None = None,
        limits: Limits | None = None,
        template_arguments: Mapping[str, Argument] | None = None,
    ) -> None:
        self.base, self.key_variable = base_url(address), key_variable
        self.template_arguments = dict(template_arguments or {})
        self.limits = limits or Limits()
        self._key = key
        self._certificates = httpx.create_ssl_context()
        self._proxy = proxy_of(self.base)
        if self._proxy:
            self.client()  # reports at once a proxy that httpx cannot use

    def __repr__(self) -> str:
        return f"Endpoint({self.url})"

    @property
    def url(self) -> str:
        """The address of chat completions."""
        return f"{self.base}/chat/completions"

    def client(self) -> httpx.AsyncClient:
        """An HTTP client for one event loop, through the environment's proxy where it sets one.

        Raises:
            UserError: the proxy cannot be used.
        """
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key.get_secret_value()}"
        try:
            if self._proxy and not has_port(httpx.URL(self._proxy.address)):
                raise ValueError("no such port")
            return httpx.AsyncClient(
                headers=headers,
                verify=self._certificates,
                follow_redirects=False,
                timeout=httpx.Timeout(self.limits.timeout, connect=30.0),
                limits=httpx.Limits(max_connections=self.limits.in_flight),
                proxy=self._proxy.address if self._proxy else None,
                trust_env=False,
            )
        except (ImportError, ValueError, httpx.InvalidURL):  # their texts may contain a password
            assert self._proxy, "only the proxy comes from outside"
            raise UserError(
                f"the proxy in {self._proxy.source} cannot be used",
                where=self.url,
                expected="http(s)://host:port; SOCKS needs the package httpx[socks]",
                fix=f"correct {self._proxy.source}, or {self._without_proxy}",
            ) from None

    @asynccontextmanager
    async def connect(self, patience: float | None = None) -> AsyncIterator[Connection]:
        """A connection for one event loop, which sends requests again for `patience` seconds (by
        default those of the limits)."""
        async with self.client() as client:
            yield Connection(self, client, self.limits.patience if patience is None else patience)

    def clean(self, text: str) -> str:
        """A server's text for a message: one line of at most 300 printable characters, without the
        key."""
        line = " ".join(self._hide(text).split())
        line = "".join(c if c.isprintable() else "\ufffd" for c in line)
        return line if len(line) <= 300 else f"{line[:300]}…"

    def completion(self, text: str) -> str:
        """A completion without the key, which a server may echo."""
        secret = self._key and len(self._key.get_secret_value()) >= SECRET_LENGTH
        return self._hide(text) if secret else text

    def _hide(self, text: str) -> str:
        return text.replace(self._key.get_secret_value(), "[key]") if self._key else text

    def explain(self, fault: Fault) -> UserError:
        """The fault as an error for a person: which endpoint, what happened, what to do."""
        if fault.unauthorised:
            what = f"the key in ${self.key_variable}" if self._key else "a request without a key"
            return UserError(
                f"the server refuses {what} ({fault.reason})",
                where=self.url,
                fix="set key_variable to the name of an environment variable with a valid key",
            )
        advice = fault.advice
        if self._proxy:
            advice = (
                f"it is asked through the proxy in {self._proxy.source}: "
                f"{self._without_proxy} if it needs none; else {advice}"
            )
        return UserError(f"the server does not answer ({fault.reason})", where=self.url, fix=advice)

    @property
    def _without_proxy(self) -> str:
        return f"add {httpx.URL(self.base).host} to NO_PROXY"


class Connection:
    """An open connection to an endpoint.

    Every method sends its request again while the server is busy or away, for `patience` seconds.

    Raises:
        Fault: (every method) a fault is final, or it lasts longer than that.
    """

    def __init__(self, endpoint: Endpoint, client: httpx.AsyncClient, patience: float) -> None:
        self.endpoint, self.limits, self.patience = endpoint, endpoint.limits, patience
        self._client = client

    async def ask(self, body: Mapping[str, Any], patience: float | None = None) -> Reply:
        """The reply to a request with `messages`, or with a `prompt` that the server continues."""
        path = "completions" if "prompt" in body else "chat/completions"
        if self.endpoint.template_arguments and "messages" in body:
            body = {**body, "chat_template_kwargs": self.endpoint.template_arguments}
        return await self._request(path, body, partial(self._parsed, Reply), patience)

    async def models(self) -> dict[str, Card]:
        """The models that the server lists, by name."""
        found = await self._request("models", None, partial(self._parsed, _Cards))
        return {card.id: card for card in found.data}

    async def load_adapter(self, body: Mapping[str, str]) -> None:
        """Have the server load a LoRA adapter (`lora_name`, `lora_path`), as vLLM can.

        A status of 500 is final: vLLM sends it for an adapter that it cannot use.
        """
        await self._request("load_lora_adapter", body, bytes, final={500})

    async def _request(
        self,
        path: str,
        body: Mapping[str, Any] | None,
        read: Callable[[bytes], T],
        patience: float | None = None,
        final: Collection[int] = (),
    ) -> T:
        ends = time.monotonic() + (self.patience if patience is None else patience)
        for number in itertools.count():
            try:
                return read(await self._send(path, body))
            except Fault as fault:
                fault.again = fault.again and fault.status not in final
                pause = fault.after + self._backoff(number)
                if not fault.again or fault.too_long or time.monotonic() + pause > ends:
                    raise
                level = logging.WARNING if pause >= 10 else logging.INFO
                _log.log(level, "%s: %s; again in %.1f s", self.endpoint.url, fault.reason, pause)
            await asyncio.sleep(pause)
        raise AssertionError("count() does not end")

    def _backoff(self, attempt: int) -> float:
        """The pause in seconds: up to twice as long each time, and random, so that requests do not
        come back all at once."""
        longest = min(self.limits.longest_backoff, self.limits.backoff * 2.0 ** min(attempt, 30))
        return longest * random.uniform(0.5, 1.0)

    async def _send(self, path: str, body: Mapping[str, Any] | None) -> bytes:
        """The body of the reply with status 200 to a POST, or to a GET without a body."""
        method, content = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        url = f"{self.endpoint.base}/{path}"
        try:
            # httpx's own timeout starts again with each byte
            async with (
                asyncio.timeout(self.limits.timeout),
                self._client.stream(method, url, content=content) as response,
            ):
                return self._accept(response, await _read(response))
        except TimeoutError:
            reason = f"no whole reply within {self.limits.timeout:g} s"
        except httpx.RequestError as error:
            reason = f"no connection, or a broken one: {type(error).__name__} {error}"
        raise Fault(self.endpoint.clean(reason), again=True)

    def _accept(self, response: httpx.Response, raw: bytes) -> bytes:
        status, message = error_of(response.status_code, raw)
        if status == 200:
            return raw
        if 300 <= status < 400:
            message = f"it redirects to {response.headers.get('location')}, which is not followed"
        raise Fault(
            self.endpoint.clean(f"HTTP {status}: {message}"),
            status=status,
            again=status in BUSY or status >= 500,
            after=retry_after(response.headers.get("retry-after", "")),
        )

    def _parsed(self, kind: type[Parsed], raw: bytes) -> Parsed:
        try:
            return kind.model_validate_json(raw)
        except ValidationError:
            what = "completion" if kind is Reply else "list of models"
            reason = f"HTTP 200, but no {what}: {error_of(200, raw)[1]}"
            raise Fault(self.endpoint.clean(reason), status=200, again=True) from None


async def _read(response: httpx.Response) -> bytes:
    raw = bytearray()
    async for chunk in response.aiter_bytes():
        raw += chunk
        if len(raw) > LARGEST_REPLY:
            raise Fault(f"a reply of more than {LARGEST_REPLY:,} bytes")
    return bytes(raw)


def open_endpoint(settings: PolicySettings, limits: Limits | None = None) -> Endpoint:
    """The endpoint that the settings name, with its key from the environment; it is not asked yet.

    Raises:
        UserError: its address is not a plain http(s) address, the key that the settings name is
            missing, or the proxy cannot be used.
    """
    assert settings.endpoint, "only settings with an endpoint come here"
    variable = settings.key_variable
    key = key_in(variable) if variable else None
    if limits is None and settings.batch_rows:
        limits = Limits(in_flight=settings.batch_rows)
    return Endpoint(
        settings.endpoint,
        key=key,
        key_variable=variable,
        limits=limits,
        template_arguments=settings.template_arguments,
    )


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """The coroutine's result, also inside of a running event loop (a notebook, an async flow)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, main).result()
    return asyncio.run(main)
