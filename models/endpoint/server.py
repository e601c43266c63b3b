"""A policy behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, TGI or a hosted one.

`tasks.policies.opening` opens it for the policy that is trained, `models.judges.opening` for a
judge. What a server ignores in silence (n, seed, temperature, stop strings, log-probabilities) is
found by asking it at the start, not trusted. The adapter of an iteration is loaded by the server
itself (`models.endpoint.served_adapter`), and its name must be on every reply.

`models.endpoint.client` says how long a request is asked again. When it gives up:

- the request is too long: its completions are "overflow", as a local policy's;
- anything else: the server is asked for one token. Does it still answer, then the trouble is the
  request's own: its completions are "refused", and the other requests keep theirs. Does it not, the
  whole call fails with a `UserError`, and the finished answers of this call are lost: stages keep
  theirs shard by shard.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args

import httpx
import numpy as np

from constitutions.errors import UserError
from constitutions.foreign_text import without_control_tokens
from models.endpoint.client import Endpoint, Fault, Limits, open_endpoint, run_async
from models.endpoint.replies import Reply, ReplyChoice
from models.endpoint.served_adapter import MISSING, ServedAdapter, no_adapters
from models.policy import Completion, Message, Messages, PolicySettings, Progress, Request, Scoring
from models.thoughts import KNOWN, SplitText, Tags, tell_apart_unseen

PROBE: Message = {"role": "user", "content": "Write a random number between one and a million."}
PROBE_TOKENS = 16
MOST_STOPS = 4
"""Stop strings that OpenAI takes; we cut at the others ourselves."""

Limit = Literal["max_tokens", "max_completion_tokens"]
"""What a server calls the longest answer: OpenAI's later models take the second only."""
LIMITS: tuple[Limit, ...] = get_args(Limit)
STOPPED = frozenset({"stop", "eos_token", "stop_sequence"})
"""Finish reasons of a whole answer."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """What a server was seen to do, asked one request at a time."""

    n: bool
    """Several different completions in one reply; else each is a request of its own."""
    seed: bool
    """Same seed, same completion; another seed, another one."""
    varies: bool
    """Whether completions at temperature 1 ever differ: some servers ignore the temperature."""
    stop: bool
    """Ends at a stop string; else none is sent, and the answer is cut here."""
    logprobs: bool
    """Tells the log-probabilities of what it says."""
    limit: Limit

    def body(
        self,
        model: str,
        asked: Messages | str,
        max_tokens: int,
        *,
        n: int = 1,
        stop: Sequence[str] = (),
        **more: int | float,
    ) -> dict[str, Any]:
        """A request, as the server takes it. What it need not say it does not: some refuse it.

        Control tokens in what was said are broken: the server's tokenizer would obey them.
        """
        if isinstance(asked, str):
            body: dict[str, Any] = {"model": model, "prompt": asked, "max_tokens": max_tokens}
        else:
            safe = [{**m, "content": without_control_tokens(m["content"])} for m in asked]
            body = {"model": model, "messages": safe, self.limit: max_tokens}
        if n > 1:
            body["n"] = n
        if stop and self.stop:
            body["stop"] = list(stop[:MOST_STOPS])
        if self.logprobs:
            body["logprobs"] = 1 if isinstance(asked, str) else True
        return body | more


# The policy --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Completions `first` … `first + count - 1` of a request, which one task asks for."""

    request: Request
    first: int
    count: int


class ServerPolicy:
    """`Policy` over an endpoint, for `generate` alone: the base, or an adapter that it has loaded.

    Completion i depends on the request alone only as far as the server honours its seed
    (`support`); the same requests may be answered otherwise when many are in flight. `logprob` is
    what the server says (vLLM: at temperature 1, the end included), NaN where it says nothing.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        support: Support,
        adapter: ServedAdapter | None = None,
        settings: PolicySettings | None = None,
    ) -> None:
        self._tags = tags_of(settings or PolicySettings())
        self._thought_tokens = settings.thought_tokens if settings else 0
        self.endpoint, self.support, self.adapter = endpoint, support, adapter
        self.model = adapter.name if adapter else model
        self._answered, self._refusal = False, cast("Fault | None", None)

    def __repr__(self) -> str:
        return f"ServerPolicy({self.model!r} at {self.endpoint.url})"

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[Completion]]:
        """See `Policy.generate`. `finish` may be "refused": no text, and the others have theirs.

        What ended an answer otherwise than by its own end (a content filter, say) is "length": it
        is not whole. Tokens of several completions in one reply are counted by the server together,
        and shared out by their log-probabilities, or by their characters.

        Raises:
            UserError: the server is away or busy for too long, refuses the key or all requests, or
                answers with another model than the adapter.
        """
        return run_async(self._generate(requests, progress)) if requests else []

    def logprobs(self, pairs: Sequence[tuple[Messages, str]]) -> list[Scoring]:
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
        body = self.support.body(
            self.model,
            request.messages,
            request.max_tokens + (0 if isinstance(request.messages, str) else self._thought_tokens),
            n=n,
            stop=request.stop,
            seed=_seed(request.key, first),
            temperature=request.temperature,
            top_p=request.top_p,
        )
        try:
            reply = await self.reply(client, body)
        except Fault as fault:
            return [await self._failed(client, fault)] * n
        self._answered = True
        return self._completions(reply, request)[:n]

    async def reply(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> Reply:
        """The reply to a body that names our model.

        A server that was started again has forgotten the adapter: it loads it anew.

        Raises:
            Fault: see `Endpoint.ask`.
            UserError: another model than the adapter answers, or it cannot be loaded again.
        """
        limits = self.endpoint.limits
        try:
            reply = await self.endpoint.ask(client, body, limits.patience)
        except Fault as fault:
            if self.adapter is None or fault.status != 404:
                raise
            await self.adapter.load(self.endpoint, client, limits.patience)
            reply = await self.endpoint.ask(client, body, limits.patience)
        if self.adapter and reply.model != self.adapter.name:
            raise UserError(
                f"{self.endpoint.clean(reply.model or 'a model without a name')} answers",
                where=self.endpoint.url,
                expected=f"the adapter {self.adapter.name} by its name",
                fix="serve the base by vLLM, or run in process (no endpoint)",
            )
        return reply

    async def _failed(self, client: httpx.AsyncClient, fault: Fault) -> Completion:
        """What a request is left with; raises where the fault is the server's (see the module)."""
        if fault.too_long:
            return Completion(text="", tokens=0, logprob=0.0, finish="overflow")
        try:
            body = self.support.body(self.model, (PROBE,), 1)
            await self.endpoint.ask(client, body, self.endpoint.limits.start)
        except Fault:
            raise self.endpoint.explain(fault) from None
        _log.warning("%s: refused a request: %s", self.endpoint.url, fault.reason)
        self._refusal = fault
        return Completion(text="", tokens=0, logprob=0.0, finish="refused")

    def _completions(self, reply: Reply, request: Request) -> list[Completion]:
        told = [len(choice.token_logprobs) for choice in reply.choices]
        sizes = told if all(told) else [len(text) for text in reply.texts]
        shares = _shares(reply.tokens, sizes)
        return [
            self._completion(choice, tokens, request.stop)
            for choice, tokens in zip(reply.choices, shares, strict=True)
        ]

    def _completion(self, choice: ReplyChoice, tokens: int, stop: Sequence[str]) -> Completion:
        told = self._told_apart(choice)
        text = _until(told.answer, stop)
        cut = text != told.answer
        logprobs = [] if cut else choice.token_logprobs
        ended = cut or choice.finish_reason in STOPPED
        return Completion(
            text=self.endpoint.completion(text.strip()),
            thoughts=self.endpoint.completion(told.thoughts),
            tokens=tokens,
            logprob=math.fsum(logprobs) if logprobs else math.nan,
            finish="stop" if ended and told.whole else "length",
        )

    def _told_apart(self, choice: ReplyChoice) -> SplitText:
        """Thoughts and answer: as the server tells them apart, or by the tags in what it says."""
        if choice.message is None:  # a text that was continued
            return SplitText("", choice.said)
        if choice.thoughts:
            return SplitText(choice.thoughts, choice.said, whole=bool(choice.said.strip()))
        return tell_apart_unseen(choice.said, self._tags)


def tags_of(settings: PolicySettings) -> tuple[Tags, ...]:
    """The tags that thoughts may have: the template that the server uses is not seen here."""
    if settings.thought_tags == "auto":
        return KNOWN
    return () if settings.thought_tags == "none" else (Tags(*settings.thought_tags),)


def _until(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings: some servers ignore them, or leave one in."""
    ends = [text.find(mark) for mark in stop if mark in text]
    return text[: min(ends)] if ends else text


def _seed(key: str, sample: int) -> int:
    """31 bits: what every server takes."""
    return int.from_bytes(hashlib.blake2b(f"{key}/{sample}".encode(), digest_size=4).digest()) >> 1


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """`total` in whole parts, as the weights are to each other."""
    known = weights if sum(weights) else [1] * len(weights)
    ends = [total * part // sum(known) for part in itertools.accumulate(known)]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


# Opening one -------------------------------------------------------------------------------


def open_server(
    settings: PolicySettings, adapter: Path | None = None, limits: Limits | None = None
) -> ServerPolicy:
    """The policy at its endpoint, after a few requests that show what the server can do.

    A server adds what its model's generation config says and a request does not name (top-k, a
    repetition penalty): start vLLM with `--generation-config vllm`.

    Args:
        adapter: its folder, under a path that the server sees, too; None is the base alone.

    Raises:
        UserError: no such address, no key where one is named, no usable answer, or an adapter that
            cannot be loaded or is not what answers.
    """
    return run_async(_open(open_endpoint(settings, limits), settings, adapter))


async def _open(endpoint: Endpoint, settings: PolicySettings, adapter: Path | None) -> ServerPolicy:
    base = settings.served_name
    async with endpoint.client() as client:
        support = await _probe(endpoint, client, base)
        if not support.varies:
            _log.warning(
                "%s: %s says the same at temperature 1 whatever the seed; does the server ignore "
                "the temperature? (transformers: do_sample in generation_config.json)",
                endpoint.url,
                base,
            )
        if adapter is None:
            return ServerPolicy(endpoint, base, support, settings=settings)
        served = ServedAdapter.of(adapter, base)
        await served.load(endpoint, client, endpoint.limits.start)
        policy = ServerPolicy(endpoint, base, support, served, settings)
        await _check_adapter(policy, served, client)
        return policy


async def _check_adapter(
    policy: ServerPolicy, adapter: ServedAdapter, client: httpx.AsyncClient
) -> None:
    """Whether it is the adapter that answers: by the reply's name, and by its log-probabilities."""
    told, endpoint = policy.support.logprobs, policy.endpoint
    body = partial(
        policy.support.body,
        asked=(PROBE,),
        max_tokens=PROBE_TOKENS,
        temperature=0.0 if told else 1.0,
    )
    try:
        tuned = await policy.reply(client, body(adapter.name))
        if told:
            alone, start = body(adapter.base), endpoint.limits.start
            base, again = [await endpoint.ask(client, alone, start) for _ in range(2)]
            adapter.check_acts(endpoint, base.choices[0], again.choices[0], tuned.choices[0])
    except Fault as fault:
        raise endpoint.explain(fault) from None


async def _probe(endpoint: Endpoint, client: httpx.AsyncClient, model: str) -> Support:
    """Ask twice with one seed and once with another, in the first way that is not refused."""
    refused: Fault | None = None
    ask = partial(_sample, endpoint, client, model)
    for several, limit in itertools.product((True, False), LIMITS):
        plain = Support(
            n=several, seed=False, varies=False, stop=False, logprobs=False, limit=limit
        )
        try:
            first, again, other = [(await ask(plain, seed=seed)).texts for seed in (1, 1, 2)]
        except Fault as fault:
            refused = refused or fault
            if fault.status not in (400, 422):
                break
            continue
        found = replace(
            plain,
            n=several and len(first) == 2 and len(set(first)) == 2,
            seed=first == again != other,
            varies=len({*first, *again, *other}) > 1,
        )
        return await _probe_extras(ask, found)
    assert refused is not None
    raise endpoint.explain(refused)


async def _probe_extras(ask: Callable[..., Awaitable[Reply]], found: Support) -> Support:
    """With log-probabilities and stop strings as far as they work; refusing one is no fault."""

    async def greedy(support: Support, stop: Sequence[str] = ()) -> Reply | None:
        try:
            return await ask(support, temperature=0.0, stop=stop)
        except Fault:
            return None

    telling, stopping = replace(found, logprobs=True), replace(found, stop=True)
    told = await greedy(telling)
    values = told.choices[0].token_logprobs if told else []
    whole = told or await greedy(found)
    text = whole.texts[0] if whole else ""
    mark = re.search(r"[^\s\ufffd]{1,4}", text[len(text) // 2 :])
    cut = await greedy(stopping, [mark[0]]) if mark else None
    return replace(
        found,
        logprobs=bool(values) and all(map(math.isfinite, values)),
        stop=cut is not None and len(cut.texts[0]) < len(text),
    )


async def _sample(
    endpoint: Endpoint,
    client: httpx.AsyncClient,
    model: str,
    support: Support,
    *,
    seed: int = 1,
    temperature: float = 1.0,
    stop: Sequence[str] = (),
) -> Reply:
    body = support.body(
        model,
        (PROBE,),
        PROBE_TOKENS,
        n=2 if support.n and temperature else 1,
        stop=stop,
        seed=seed,
        temperature=temperature,
        top_p=1.0,
    )
    return await endpoint.ask(client, body, endpoint.limits.start)


def check_server(settings: PolicySettings, *, adapters: bool, limits: Limits | None = None) -> None:
    """Ask the server for one token; and, for `adapters`, whether it loads any while it runs.

    Raises:
        UserError: no such address, no key where one is named, no answer, or no adapters.
    """

    async def look() -> None:
        endpoint = open_endpoint(settings, limits)
        async with endpoint.client() as client:
            try:
                await _first_answer(endpoint, client, settings.served_name)
                if adapters:
                    await _takes_adapters(endpoint, client)
            except Fault as fault:
                raise endpoint.explain(fault) from None

    run_async(look())


async def _first_answer(endpoint: Endpoint, client: httpx.AsyncClient, model: str) -> None:
    for limit in LIMITS:
        body = {"model": model, "messages": [PROBE], limit: 1}
        try:
            await endpoint.ask(client, body, endpoint.limits.start)
            return
        except Fault as fault:
            if fault.status not in (400, 422) or limit == LIMITS[-1]:
                raise


async def _takes_adapters(endpoint: Endpoint, client: httpx.AsyncClient) -> None:
    """An empty request is refused as incomplete where the address exists."""
    try:
        await endpoint.load_adapter(client, {}, endpoint.limits.start)
    except Fault as fault:
        if fault.status in MISSING:
            raise no_adapters(endpoint, fault.reason) from None
        if fault.again or fault.status in (401, 403):
            raise
