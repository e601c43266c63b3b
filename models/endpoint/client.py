"""The line to an OpenAI-compatible server: one request asked until it is answered, or why not.

`models.endpoint.server` makes a policy of it. Servers fail in three ways, and a `Fault` says in
which:

- busy or away (408, 425, 429, 5xx, timeouts, broken connections, nonsense): asked again, with
  exponential back-off and jitter, for `Limits.patience`;
- the request is too long (`Fault.too_long`);
- anything else is final.
"""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import json
import logging
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, SecretStr, ValidationError

from constitutions.errors import UserError
from models.endpoint.proxies import proxy_of
from models.endpoint.replies import Reply
from models.policy import Argument, PolicySettings

LARGEST_REPLY = 16 * 2**20
"""Bytes. 64 completions of 16,000 tokens are about 4 MiB."""
SECRET_LENGTH = 12
"""A shorter key ("EMPTY") is no secret, and its letters may well stand in a completion."""
BUSY = frozenset({408, 425, 429})
TOO_LONG = re.compile(
    r"context.?(length|window|size)|maximum (model|sequence|input) length|max_new_tokens` must"
    r"|`inputs` must have less|(prompt|input|request)\b.{0,20} too (long|large)|reduce the length",
    re.IGNORECASE,
)
"""How vLLM, SGLang, TGI, llama.cpp and hosted servers say so; there is no common error code."""

_log = logging.getLogger(__name__)
for _name in ("httpx", "httpcore"):  # they log what a server sends: an echoed key, too
    logging.getLogger(_name).setLevel(logging.WARNING)
T = TypeVar("T")
Told = TypeVar("Told", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How hard a server is asked. Times are in seconds."""

    in_flight: int = 32
    timeout: float = 600.0
    """Of one attempt, to the last byte of the reply: answers are not streamed."""
    patience: float = 1200.0
    """A request is asked again for so long, as when the server restarts."""
    start: float = 90.0
    """As `patience`, for the first requests, and when in doubt whether the server still answers."""
    backoff: float = 1.0
    """The first pause; each is up to twice the one before."""
    longest_backoff: float = 60.0


class Card(BaseModel):
    """A model that a server lists; an adapter names its base as `parent`."""

    id: str
    root: str | None = None
    parent: str | None = None


class _Cards(BaseModel):
    data: list[Card]


class Fault(Exception):
    """Why there is no reply. `again`: it may pass; `after`: not before so many seconds."""

    def __init__(
        self, reason: str, *, status: int | None = None, again: bool = False, after: float = 0.0
    ) -> None:
        self.reason, self.status, self.again, self.after = reason, status, again, after
        super().__init__(reason)

    @property
    def too_long(self) -> bool:
        """Whether the request does not fit the model's context (429 counts tokens per minute)."""
        return self.status not in (None, 429) and TOO_LONG.search(self.reason) is not None


class Endpoint:
    """A server over HTTP(S), certificates verified, no redirects. It never shows its key.

    Raises:
        UserError: the endpoint is no plain http(s) address.
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
        self.base, self.key_variable = _base_url(address), key_variable
        self.template_arguments = dict(template_arguments or {})
        self.limits = limits or Limits()
        self._key = key
        self._certificates = httpx.create_ssl_context()
        self._proxy = proxy_of(self.base)
        if self._proxy:
            self.client()  # a proxy that httpx cannot use is said at once

    def __repr__(self) -> str:
        return f"Endpoint({self.url})"

    @property
    def url(self) -> str:
        """Where chat completions are asked for."""
        return f"{self.base}/chat/completions"

    def client(self) -> httpx.AsyncClient:
        """Connections for one event loop, through the environment's proxy where it sets one."""
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key.get_secret_value()}"
        try:
            if self._proxy and not _has_port(httpx.URL(self._proxy.address)):
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
        except (ImportError, ValueError, httpx.InvalidURL):  # their texts may hold a password
            assert self._proxy, "nothing else is given from outside"
            raise UserError(
                f"the proxy in {self._proxy.source} cannot be used",
                where=self.url,
                expected="http(s)://host:port; SOCKS needs the package httpx[socks]",
                fix=f"mend {self._proxy.source}, or {self._without_proxy}",
            ) from None

    async def ask(
        self, client: httpx.AsyncClient, body: Mapping[str, Any], patience: float | None = None
    ) -> Reply:
        """The reply to `messages`, or to a `prompt` that is continued as it stands.

        Asked for again while the server is busy or away.

        Raises:
            Fault: one that does not pass, or not within `patience` seconds.
        """
        path = "completions" if "prompt" in body else "chat/completions"
        if self.template_arguments and "messages" in body:
            body = {**body, "chat_template_kwargs": self.template_arguments}

        async def attempt() -> Reply:
            return self._read_as(Reply, await self._send(client, path, body))

        longest = self.limits.patience if patience is None else patience
        return await self._patiently(attempt, longest)

    async def models(self, client: httpx.AsyncClient, patience: float) -> dict[str, Card]:
        """The models that the server lists, by their names.

        Raises:
            Fault: as `ask`.
        """

        async def attempt() -> dict[str, Card]:
            found = self._read_as(_Cards, await self._send(client, "models"))
            return {card.id: card for card in found.data}

        return await self._patiently(attempt, patience)

    async def load_adapter(
        self, client: httpx.AsyncClient, body: Mapping[str, str], patience: float
    ) -> None:
        """Have the server load a LoRA adapter (`lora_name`, `lora_path`), the way vLLM does it.

        Raises:
            Fault: as `ask`. A 500 is final: vLLM says so of an adapter that it cannot take.
        """

        async def attempt() -> None:
            try:
                await self._send(client, "load_lora_adapter", body)
            except Fault as fault:
                fault.again = fault.again and fault.status != 500
                raise

        await self._patiently(attempt, patience)

    async def _patiently(self, attempt: Callable[[], Awaitable[T]], patience: float) -> T:
        ends = time.monotonic() + patience
        for number in itertools.count():
            try:
                return await attempt()
            except Fault as fault:
                pause = fault.after + self._backoff(number)
                if not fault.again or fault.too_long or time.monotonic() + pause > ends:
                    raise
                level = logging.WARNING if pause >= 10 else logging.INFO
                _log.log(level, "%s: %s; again in %.1f s", self.url, fault.reason, pause)
            await asyncio.sleep(pause)
        raise AssertionError("count() does not end")

    def _backoff(self, attempt: int) -> float:
        """Up to twice as long each time; the jitter keeps requests from coming back together."""
        longest = min(self.limits.longest_backoff, self.limits.backoff * 2.0 ** min(attempt, 30))
        return longest * random.uniform(0.5, 1.0)

    async def _send(
        self, client: httpx.AsyncClient, path: str, body: Mapping[str, Any] | None = None
    ) -> bytes:
        """What the server answers with 200; without a body it is only asked to show something."""
        method, content = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        try:
            # httpx's own timeout starts anew with each byte
            async with (
                asyncio.timeout(self.limits.timeout),
                client.stream(method, f"{self.base}/{path}", content=content) as response,
            ):
                return self._accept(response, await _read(response))
        except TimeoutError:
            reason = f"no whole reply within {self.limits.timeout:g} s"
            raise Fault(reason, again=True) from None
        except httpx.RequestError as error:
            reason = self.clean(f"no connection, or a broken one: {type(error).__name__} {error}")
            raise Fault(reason, again=True) from None

    def _accept(self, response: httpx.Response, raw: bytes) -> bytes:
        status, message = _error(response.status_code, raw)
        if status == 200:
            return raw
        if 300 <= status < 400:
            message = f"it redirects to {response.headers.get('location')}, which is not followed"
        raise Fault(
            self.clean(f"HTTP {status}: {message}"),
            status=status,
            again=status in BUSY or status >= 500,
            after=_retry_after(response.headers.get("retry-after", "")),
        )

    def _read_as(self, kind: type[Told], raw: bytes) -> Told:
        try:
            return kind.model_validate_json(raw)
        except ValidationError:
            what = "completion" if kind is Reply else "list of models"
            reason = f"HTTP 200, but no {what}: {_error(200, raw)[1]}"
            raise Fault(self.clean(reason), status=200, again=True) from None

    def clean(self, text: str) -> str:
        """A server's words for a message: one short line of printable characters, no key."""
        line = " ".join(self._hide(text).split())
        line = "".join(c if c.isprintable() else "\ufffd" for c in line)
        return line if len(line) <= 300 else f"{line[:300]}…"

    def completion(self, text: str) -> str:
        """A completion as it is, but for a key that the server echoes."""
        secret = self._key and len(self._key.get_secret_value()) >= SECRET_LENGTH
        return self._hide(text) if secret else text

    def _hide(self, text: str) -> str:
        return text.replace(self._key.get_secret_value(), "[key]") if self._key else text

    def explain(self, fault: Fault) -> UserError:
        """The fault for a person: which endpoint, what happened, what to do."""
        if fault.status in (401, 403):
            what = f"the key in ${self.key_variable}" if self._key else "a request without a key"
            return UserError(
                f"the server refuses {what} ({fault.reason})",
                where=self.url,
                fix="set key_variable to the name of an environment variable with a valid key",
            )
        advice = _advice(fault)
        if self._proxy:
            advice = (
                f"it is asked through the proxy in {self._proxy.source}: "
                f"{self._without_proxy} if it needs none; else {advice}"
            )
        return UserError(f"the server does not answer ({fault.reason})", where=self.url, fix=advice)

    @property
    def _without_proxy(self) -> str:
        return f"add {httpx.URL(self.base).host} to NO_PROXY"


def _advice(fault: Fault) -> str:
    named = "policy.served_model (or policy.model) is a name that it serves"
    if fault.status == 429:
        return "its rate limit or quota is used up: wait or raise it, then run this again"
    if fault.again:
        return f"see that it runs, is reachable from here, and that {named}; its log says more"
    if fault.status in (301, 302, 303, 307, 308, 404, 405):
        return f"check the endpoint's address, and that {named}"
    return f"check that {named}, and what its log says"


def _base_url(address: str) -> str:
    """The address with its version; `address` may end before or after its "/v1"."""
    try:
        url = httpx.URL(address.strip())
    except httpx.InvalidURL:
        url = httpx.URL("")
    plain = not (url.userinfo or url.query or url.fragment)
    if url.scheme not in ("http", "https") or not url.host or not plain or not _has_port(url):
        raise UserError(  # the address is not shown: it may hold a password
            "this is not the address of a server",
            where="setting 'endpoint'",
            expected='"http(s)://host[:port][/path]", without user, password, "?" or "#"',
            fix="a key goes into the environment variable that key_variable names",
        )
    path = url.path.rstrip("/").removesuffix("/chat/completions")
    if not re.search(r"/v\d\w*(/|\Z)", path):
        path += "/v1"
    return str(url.copy_with(path=path))


def _has_port(url: httpx.URL) -> bool:
    """Whether the port is one: httpx takes any number, and fails when it connects."""
    return url.port is None or 0 < url.port < 2**16


async def _read(response: httpx.Response) -> bytes:
    raw = bytearray()
    async for chunk in response.aiter_bytes():
        raw += chunk
        if len(raw) > LARGEST_REPLY:
            raise Fault(f"a reply of more than {LARGEST_REPLY:,} bytes")
    return bytes(raw)


def _error(status: int, raw: bytes) -> tuple[int, str]:
    """The status and what the server says of it; some send 200 with an error inside."""
    text = raw[:10_000].decode(errors="replace")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        return status, text
    if not isinstance(data, dict):
        return status, text
    error = data.get("error")
    inside = error if isinstance(error, dict) else {}
    if status == 200 and error:
        code = inside.get("code")
        status = code if isinstance(code, int) and 400 <= code < 600 else 502
    message = inside.get("message") or data.get("message") or data.get("detail") or error
    kinds = [inside.get(name) for name in ("code", "type")]  # "context_length_exceeded"
    kind = next((f" ({k})" for k in kinds if isinstance(k, str)), "")
    return status, f"{message}{kind}" if message else text


def _retry_after(value: str) -> float:
    """Seconds from now: the header has a number or a date."""
    if re.fullmatch(r"\d{1,9}(\.\d*)?", value.strip()):
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def open_endpoint(settings: PolicySettings, limits: Limits | None = None) -> Endpoint:
    """The endpoint that the settings name, with its key out of the environment. Asks nothing.

    Raises:
        UserError: it is no plain http(s) address, or there is no key where one is named.
    """
    assert settings.endpoint, "the caller sees to it"
    variable = settings.key_variable
    key = _key(variable) if variable else None
    if limits is None and settings.batch_rows:
        limits = Limits(in_flight=settings.batch_rows)
    return Endpoint(
        settings.endpoint,
        key=key,
        key_variable=variable,
        limits=limits,
        template_arguments=settings.template_arguments,
    )


def _key(variable: str) -> SecretStr:
    key = SecretStr(os.environ.get(variable, "").strip())
    where = "setting 'key_variable'"
    if not key:
        raise UserError(
            f"the environment variable {variable} is not set",
            where=where,
            fix=f"export {variable}=… before the run, or unset key_variable for a server without",
        )
    if not re.fullmatch(r"[!-~]+", key.get_secret_value()):
        raise UserError(  # h11 would quote the header
            f"the environment variable {variable} holds no key",
            where=where,
            expected="printable ASCII characters without spaces",
        )
    return key


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """The coroutine's result, also where a loop runs already (a notebook, an async flow)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, main).result()
    return asyncio.run(main)
