"""A policy behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, TGI or a hosted one.

`models.judges.open_policy` opens it for a judge. What a server ignores in silence (n, seed,
temperature) is found by asking it at the start, not trusted.

Servers fail in three ways, told apart for every request:

- busy or away (408, 425, 429, 5xx, timeouts, broken connections, nonsense): asked again, with
  exponential back-off and jitter, for `Limits.patience`;
- the request is too long: its completions are "overflow", as a local policy's;
- anything else, and patience at its end: the server is asked for one token. Does it still answer,
  then the trouble is the request's own: its completions are "refused", and the other requests keep
  theirs. Does it not, the whole call fails with a `UserError`, and the finished answers of this
  call are lost: stages keep theirs shard by shard.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import itertools
import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NoReturn, TypeVar, cast, get_args

import httpx
import numpy as np
from pydantic import BaseModel, Field, SecretStr, ValidationError

from constitutions.errors import UserError
from models.judges import JudgeSettings
from models.policy import Completion, Message, Progress, Request, Scoring

PROBE: Message = {"role": "user", "content": "Write a random number between one and a million."}
PROBE_TOKENS = 16
LARGEST_REPLY = 16 * 2**20
"""Bytes. 64 completions of 16,000 tokens are about 4 MiB."""
SECRET_LENGTH = 12
"""A shorter key ("EMPTY") is no secret, and its letters may well stand in a completion."""

Limit = Literal["max_tokens", "max_completion_tokens"]
"""What a server calls the longest answer: OpenAI's later models take the second only."""
LIMITS: tuple[Limit, ...] = get_args(Limit)
STOPPED = frozenset({"stop", "eos_token", "stop_sequence"})
"""Finish reasons of a whole answer."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How hard a server is asked. Times are in seconds."""

    in_flight: int = 16
    timeout: float = 600.0
    """Of one attempt, to the last byte of the reply: answers are not streamed."""
    patience: float = 1200.0
    """A request is asked again for so long, as when the server restarts."""
    start: float = 90.0
    """As `patience`, for the first requests, and when in doubt whether the server still answers."""
    backoff: float = 1.0
    """The first pause; each is up to twice the one before."""
    longest_backoff: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """What a server was seen to do, asked one request at a time."""

    n: bool
    """Several different completions in one reply; else each is a request of its own."""
    seed: bool
    """Same seed, same completion; another seed, another one."""
    varies: bool
    """Whether completions at temperature 1 ever differ: some servers ignore the temperature."""
    limit: Limit


# The wire ----------------------------------------------------------------------------------


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    completion_tokens: int = Field(ge=0)


class Reply(BaseModel):
    """What is read of a chat completion; a reply without it counts as a fault."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage

    @property
    def texts(self) -> list[str]:
        """What the choices say, without white space around it."""
        return [(choice.message.content or "").strip() for choice in self.choices]


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
    """Chat completions over HTTP(S), certificates verified, no redirects. It never shows its key.

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
    ) -> None:
        self.url, self.key_variable = _chat_url(address), key_variable
        self.limits = limits or Limits()
        self._key = key
        self._certificates = httpx.create_ssl_context()

    def __repr__(self) -> str:
        return f"Endpoint({self.url})"

    def client(self) -> httpx.AsyncClient:
        """Connections for one event loop."""
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key.get_secret_value()}"
        return httpx.AsyncClient(
            headers=headers,
            verify=self._certificates,
            follow_redirects=False,
            timeout=httpx.Timeout(self.limits.timeout, connect=30.0),
            limits=httpx.Limits(max_connections=self.limits.in_flight),
        )

    async def ask(
        self, client: httpx.AsyncClient, body: Mapping[str, Any], patience: float | None = None
    ) -> Reply:
        """The reply, asked for again while the server is busy or away.

        Raises:
            Fault: one that does not pass, or not within `patience` seconds.
        """
        ends = time.monotonic() + (self.limits.patience if patience is None else patience)
        for attempt in itertools.count():
            try:
                return await self._attempt(client, body)
            except Fault as fault:
                pause = fault.after + self._backoff(attempt)
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

    async def _attempt(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> Reply:
        content = json.dumps(body).encode()
        try:
            # httpx's own timeout starts anew with each byte
            async with (
                asyncio.timeout(self.limits.timeout),
                client.stream("POST", self.url, content=content) as response,
            ):
                return self._parse(response, await _read(response))
        except TimeoutError:
            reason = f"no whole reply within {self.limits.timeout:g} s"
            raise Fault(reason, again=True) from None
        except httpx.RequestError as error:
            reason = self.clean(f"no connection, or a broken one: {type(error).__name__} {error}")
            raise Fault(reason, again=True) from None

    def _parse(self, response: httpx.Response, raw: bytes) -> Reply:
        status, message = _error(response.status_code, raw)
        if status == 200:
            try:
                return Reply.model_validate_json(raw)
            except ValidationError:
                reason = f"HTTP 200, but no chat completion with its usage: {message}"
                raise Fault(self.clean(reason), status=status, again=True) from None
        if 300 <= status < 400:
            message = f"it redirects to {response.headers.get('location')}, which is not followed"
        raise Fault(
            self.clean(f"HTTP {status}: {message}"),
            status=status,
            again=status in BUSY or status >= 500,
            after=_retry_after(response.headers.get("retry-after", "")),
        )

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
        return UserError(
            f"the server does not answer ({fault.reason})", where=self.url, fix=_advice(fault)
        )


def _advice(fault: Fault) -> str:
    if fault.status == 429:
        return "its rate limit or quota is used up: wait or raise it, then run this again"
    if fault.again:
        return "see that it runs, is reachable from here and serves policy.model; its log says more"
    if fault.status in (301, 302, 303, 307, 308, 404, 405):
        return "check the endpoint's address, and that policy.model is a name that it serves"
    return "check that policy.model is a name that it serves, and what its log says"


def _chat_url(address: str) -> str:
    """Where chat completions are asked for; `address` may end before or after its "/v1"."""
    try:
        url = httpx.URL(address.strip())
    except httpx.InvalidURL:
        url = httpx.URL("")
    plain = not (url.userinfo or url.query or url.fragment)
    if url.scheme not in ("http", "https") or not url.host or not plain:
        raise UserError(  # the address is not shown: it may hold a password
            "this is not the address of a server",
            where="judge.endpoint",
            expected='"http(s)://host[:port][/path]", without user, password, "?" or "#"',
            fix="a key goes into the environment variable that key_variable names",
        )
    path = url.path.rstrip("/").removesuffix("/chat/completions")
    if not re.search(r"/v\d\w*(/|\Z)", path):
        path += "/v1"
    return str(url.copy_with(path=f"{path}/chat/completions"))


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


# The policy --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Completions `first` … `first + count - 1` of a request, which one task asks for."""

    request: Request
    first: int
    count: int


class ServerPolicy:
    """`Policy` over an endpoint, for `generate` alone. `logprob` is NaN: it is not asked for.

    Completion i depends on the request alone only as far as the server honours its seed
    (`support`); the same requests may be answered otherwise when many are in flight.
    """

    def __init__(self, endpoint: Endpoint, model: str, support: Support) -> None:
        self.endpoint, self.model, self.support = endpoint, model, support
        self._answered, self._refusal = False, cast("Fault | None", None)

    def __repr__(self) -> str:
        return f"ServerPolicy({self.model!r} at {self.endpoint.url})"

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[Completion]]:
        """See `Policy.generate`. `finish` may be "refused": no text, and the others have theirs.

        What ended an answer otherwise than by its own end (a content filter, say) is "length": it
        is not whole. Tokens of several completions in one reply are counted by the server together,
        and shared out by their characters.

        Raises:
            UserError: the server is away or busy for too long, or refuses the key or all requests.
        """
        return _run(self._generate(requests, progress)) if requests else []

    def logprobs(self, pairs: Sequence[tuple[tuple[Message, ...], str]]) -> list[Scoring]:
        """Chat endpoints do not score given text.

        Raises:
            UserError: always.
        """
        self._cannot("log-probabilities of given responses")

    def hidden_states(self, texts: Sequence[str]) -> np.ndarray:
        """Endpoints do not show hidden states.

        Raises:
            UserError: always.
        """
        self._cannot("hidden states")

    def _cannot(self, what: str) -> NoReturn:
        raise UserError(
            f"an endpoint gives no {what}",
            where=self.endpoint.url,
            fix="choose settings that do not need them, or run the model in process (no endpoint)",
        )

    async def _generate(
        self, requests: Sequence[Request], progress: Progress | None
    ) -> list[list[Completion]]:
        left = [len(self._jobs(request)) for request in requests]
        gate = asyncio.Semaphore(self.endpoint.limits.in_flight)

        async def work(client: httpx.AsyncClient, owner: int, job: _Job) -> list[Completion]:
            async with gate:
                completions = await self._complete(client, job)
            left[owner] -= 1
            if progress and not left[owner]:
                progress(1)
            return completions

        try:
            async with self.endpoint.client() as client, asyncio.TaskGroup() as group:
                tasks = [
                    [group.create_task(work(client, owner, job)) for job in self._jobs(request)]
                    for owner, request in enumerate(requests)
                ]
        except ExceptionGroup as failed:  # the first one ended the others
            raise failed.exceptions[0] from None
        answers = [[c for task in some for c in task.result()] for some in tasks]
        if self._refusal and not self._answered:
            raise self.endpoint.explain(self._refusal)
        return answers

    def _jobs(self, request: Request) -> list[_Job]:
        if request.temperature == 0 or self.support.n:
            return [_Job(request=request, first=0, count=request.n)]
        return [_Job(request=request, first=i, count=1) for i in range(request.n)]

    async def _complete(self, client: httpx.AsyncClient, job: _Job) -> list[Completion]:
        """The job's completions; what a reply with too few leaves out is asked for singly."""
        if job.request.temperature == 0:  # vLLM refuses n > 1 here, and all are the same
            return await self._ask(client, job.request, job.first, 1) * job.count
        done = await self._ask(client, job.request, job.first, job.count)
        while len(done) < job.count:
            done += await self._ask(client, job.request, job.first + len(done), 1)
        return done

    async def _ask(
        self, client: httpx.AsyncClient, request: Request, first: int, n: int
    ) -> list[Completion]:
        body = _body(
            self.model,
            request.messages,
            n=n,
            seed=_seed(request.key, first),
            temperature=request.temperature,
            top_p=request.top_p,
            **{self.support.limit: request.max_tokens},
        )
        try:
            reply = await self.endpoint.ask(client, body)
        except Fault as fault:
            return [await self._failed(client, fault)] * n
        self._answered = True
        return self._completions(reply)[:n]

    async def _failed(self, client: httpx.AsyncClient, fault: Fault) -> Completion:
        """What a request is left with; raises where the fault is the server's (see the module)."""
        if fault.too_long:
            return Completion(text="", tokens=0, logprob=0.0, finish="overflow")
        try:
            body = _body(self.model, [PROBE], **{self.support.limit: 1})
            await self.endpoint.ask(client, body, self.endpoint.limits.start)
        except Fault:
            raise self.endpoint.explain(fault) from None
        _log.warning("%s: refused a request: %s", self.endpoint.url, fault.reason)
        self._refusal = fault
        return Completion(text="", tokens=0, logprob=0.0, finish="refused")

    def _completions(self, reply: Reply) -> list[Completion]:
        shares = _shares(reply.usage.completion_tokens, [len(text) for text in reply.texts])
        return [
            Completion(
                text=self.endpoint.completion(text),
                tokens=tokens,
                logprob=math.nan,
                finish="stop" if choice.finish_reason in STOPPED else "length",
            )
            for choice, text, tokens in zip(reply.choices, reply.texts, shares, strict=True)
        ]


def _body(
    model: str, messages: Sequence[Message], *, n: int = 1, **more: int | float
) -> dict[str, Any]:
    """`n` is named where it is more than one: some servers refuse a request that names it."""
    several = {"n": n} if n > 1 else {}
    return {"model": model, "messages": list(messages), **several, **more}


def _seed(key: str, sample: int) -> int:
    """31 bits: what every server takes."""
    return int.from_bytes(hashlib.blake2b(f"{key}/{sample}".encode(), digest_size=4).digest()) >> 1


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """`total` in whole parts, as the weights are to each other."""
    known = weights if sum(weights) else [1] * len(weights)
    ends = [total * part // sum(known) for part in itertools.accumulate(known)]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


def _run(main: Coroutine[Any, Any, T]) -> T:
    """The coroutine's result, also where a loop runs already (a notebook, an async flow)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, main).result()
    return asyncio.run(main)


# Opening one -------------------------------------------------------------------------------


def open_server(settings: JudgeSettings, limits: Limits | None = None) -> ServerPolicy:
    """The judge's model at its endpoint, after a few requests that show what the server can do.

    A server adds what its model's generation config says and a request does not name (top-k, a
    repetition penalty): start vLLM with `--generation-config vllm`.

    Raises:
        UserError: no such address, no key where one is named, or no usable answer.
    """
    assert settings.endpoint and settings.policy, "JudgeSettings sees to it"
    endpoint = Endpoint(
        settings.endpoint,
        key=_key(settings.key_variable) if settings.key_variable else None,
        key_variable=settings.key_variable,
        limits=limits,
    )
    model = settings.policy.model
    support = _run(_probe(endpoint, model))
    if not support.varies:
        _log.warning(
            "%s: %s says the same at temperature 1 whatever the seed; does the server ignore the "
            "temperature? (transformers: do_sample in generation_config.json)",
            endpoint.url,
            model,
        )
    return ServerPolicy(endpoint, model, support)


def _key(variable: str) -> SecretStr:
    key = SecretStr(os.environ.get(variable, "").strip())
    where = "judge.key_variable"
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


async def _probe(endpoint: Endpoint, model: str) -> Support:
    """Ask twice with one seed and once with another, in the first way that is not refused."""
    refused: Fault | None = None
    async with endpoint.client() as client:
        for n, limit in itertools.product((2, 1), LIMITS):

            async def ask(seed: int, n: int = n, limit: str = limit) -> list[str]:
                more = {"temperature": 1.0, "top_p": 1.0, "seed": seed, limit: PROBE_TOKENS}
                body = _body(model, [PROBE], n=n, **more)
                return (await endpoint.ask(client, body, endpoint.limits.start)).texts

            try:
                first, again, other = await ask(1), await ask(1), await ask(2)
            except Fault as fault:
                refused = refused or fault
                if fault.status not in (400, 422):
                    break
                continue
            return Support(
                n=n == 2 and len(first) == 2 and len(set(first)) == 2,
                seed=first == again != other,
                varies=len({*first, *again, *other}) > 1,
                limit=limit,
            )
    assert refused is not None
    raise endpoint.explain(refused)
