"""A policy behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, TGI or a hosted one.

`tasks.policies.opening` opens it for the policy that is trained, `models.judges.registry` for a
judge. `models.endpoint.probing` finds out what the server can do. The server itself loads the
adapter of an iteration (`models.endpoint.served_adapter`), and every reply must name it.

`models.endpoint.client` sends a request again for some time. After that:

- a request that is too long gets the finish "overflow", as with a local policy;
- after any other fault the server is asked for one token. If it answers, the request itself is at
  fault: it gets the finish "refused", and the other requests continue. If not, the whole call fails
  with a `UserError` and loses its answers; stages keep finished shards.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np

from constitutions.errors import UserError
from models.endpoint.client import Connection, Endpoint, Limits, open_endpoint, run_async
from models.endpoint.faults import Fault
from models.endpoint.probing import PROBE, PROBE_TOKENS, Support, probe
from models.endpoint.replies import Reply, ReplyChoice
from models.endpoint.served_adapter import ServedAdapter
from models.policy import (
    Completion,
    Messages,
    PolicySettings,
    Progress,
    Request,
    Scoring,
    before,
    no_answer,
)
from models.thoughts import KNOWN, SplitText, Tags, split_unseen_text

STOPPED = frozenset({"stop", "eos_token", "stop_sequence"})
"""The finish reasons of an answer that is complete."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Completions `first` to `first + count - 1` of a request, for which one task asks."""

    request: Request
    first: int
    count: int


class ServerPolicy:
    """`Policy` over an endpoint, for `generate` alone: the base, or an adapter that it has loaded.

    A completion depends on its request alone only as far as the server honours seeds (`support`);
    with many requests in flight, the same request may get another answer. `logprob` is that of the
    server (vLLM: at temperature 1, the end included), and NaN where it sends none.
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
        """See `Policy.generate`. A request that the server refuses finishes as "refused".

        An answer that did not end by itself (a content filter cut it, say) finishes as "length". A
        server counts the tokens of all completions in a reply together; they are divided in
        proportion to the numbers of log-probabilities, or of characters.

        Raises:
            UserError: the server is away or busy for too long, refuses the key or all requests, or
                answers with another model than the adapter.
        """
        return run_async(self._generate(requests, progress)) if requests else []

    def logprobs(self, pairs: Sequence[tuple[Messages, str]]) -> list[Scoring]:
        """Raises UserError: chat endpoints do not score given texts."""
        self._cannot("log-probabilities of given responses")

    def hidden_states(self, texts: Sequence[str]) -> np.ndarray:
        """Raises UserError: endpoints do not show hidden states."""
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
        jobs = [self._jobs(request) for request in requests]
        gate = asyncio.Semaphore(self.endpoint.limits.in_flight)

        async def work(connection: Connection, job: _Job) -> list[Completion]:
            async with gate:
                completions = await self._complete(connection, job)
            if progress:
                progress(len(completions))
            return completions

        try:
            async with self.endpoint.connect() as connection, asyncio.TaskGroup() as group:
                tasks = [
                    [group.create_task(work(connection, job)) for job in some] for some in jobs
                ]
        except ExceptionGroup as failed:  # the first failure has cancelled the other tasks
            raise failed.exceptions[0] from None
        answers = [[c for task in some for c in task.result()] for some in tasks]
        if self._refusal and not self._answered:
            raise self.endpoint.explain(self._refusal)
        return answers

    def _jobs(self, request: Request) -> list[_Job]:
        if request.temperature == 0 or self.support.n:
            return [_Job(request=request, first=0, count=request.n)]
        return [_Job(request=request, first=i, count=1) for i in range(request.n)]

    async def _complete(self, connection: Connection, job: _Job) -> list[Completion]:
        """The job's completions; those that a reply lacks are requested one by one."""
        if job.request.temperature == 0:  # vLLM refuses n > 1 here, and all are the same
            return await self._ask(connection, job.request, job.first, 1) * job.count
        done = await self._ask(connection, job.request, job.first, job.count)
        while len(done) < job.count:
            done += await self._ask(connection, job.request, job.first + len(done), 1)
        return done

    async def _ask(
        self, connection: Connection, request: Request, first: int, n: int
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
            reply = await self.reply(connection, body)
        except Fault as fault:
            return [await self._failed(connection, fault)] * n
        self._answered = True
        return self._completions(reply, request)[:n]

    async def reply(self, connection: Connection, body: Mapping[str, Any]) -> Reply:
        """The reply to a body that names this model.

        A server that has restarted has lost the adapter, and is told to load it again.

        Raises:
            Fault: as `Connection.ask`.
            UserError: another model than the adapter answers, or it cannot be loaded again.
        """
        try:
            reply = await connection.ask(body)
        except Fault as fault:
            if self.adapter is None or fault.status != 404:
                raise
            await self.adapter.load(connection)
            reply = await connection.ask(body)
        if self.adapter and reply.model != self.adapter.name:
            raise UserError(
                f"{self.endpoint.clean(reply.model or 'a model without a name')} answers",
                where=self.endpoint.url,
                expected=f"the adapter {self.adapter.name} by its name",
                fix="serve the base by vLLM, or run in process (no endpoint)",
            )
        return reply

    async def _failed(self, connection: Connection, fault: Fault) -> Completion:
        """The completion of a request without a reply, or UserError where the server itself failed:
        see the top of this module."""
        if fault.too_long:
            return no_answer("overflow")
        try:
            body = self.support.body(self.model, (PROBE,), 1)
            await connection.ask(body, self.endpoint.limits.start)
        except Fault:
            raise self.endpoint.explain(fault) from None
        _log.warning("%s: refused a request: %s", self.endpoint.url, fault.reason)
        self._refusal = fault
        return no_answer("refused")

    def _completions(self, reply: Reply, request: Request) -> list[Completion]:
        counted = [len(choice.token_logprobs) for choice in reply.choices]
        sizes = counted if all(counted) else [len(text) for text in reply.texts]
        shares = _shares(reply.tokens, sizes)
        return [
            self._completion(choice, tokens, request.stop)
            for choice, tokens in zip(reply.choices, shares, strict=True)
        ]

    def _completion(self, choice: ReplyChoice, tokens: int, stop: Sequence[str]) -> Completion:
        parts = self._split(choice)
        text = before(stop, parts.answer)  # some servers ignore stop strings, or leave one in
        cut = text != parts.answer
        logprobs = [] if cut else choice.token_logprobs
        ended = cut or choice.finish_reason in STOPPED
        return Completion(
            text=self.endpoint.completion(text.strip()),
            thoughts=self.endpoint.completion(parts.thoughts),
            tokens=tokens,
            logprob=math.fsum(logprobs) if logprobs else math.nan,
            finish="stop" if ended and parts.whole else "length",
        )

    def _split(self, choice: ReplyChoice) -> SplitText:
        """The thoughts and the answer, as the server separates them or by the tags in its text."""
        if choice.message is None:  # a text that was continued
            return SplitText("", choice.answer)
        if choice.thoughts:
            return SplitText(choice.thoughts, choice.answer, whole=bool(choice.answer.strip()))
        return split_unseen_text(choice.answer, self._tags)


def tags_of(settings: PolicySettings) -> tuple[Tags, ...]:
    """The tags that thoughts may have, since the server's template is unknown."""
    if settings.thought_tags == "auto":
        return KNOWN
    return () if settings.thought_tags == "none" else (Tags(*settings.thought_tags),)


def _seed(key: str, sample: int) -> int:
    """A seed of 31 bits, which every server accepts."""
    return int.from_bytes(hashlib.blake2b(f"{key}/{sample}".encode(), digest_size=4).digest()) >> 1


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """`total` divided into whole numbers in proportion to the weights."""
    known = weights if sum(weights) else [1] * len(weights)
    ends = [total * part // sum(known) for part in itertools.accumulate(known)]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


def open_server(
    settings: PolicySettings, adapter: Path | None = None, limits: Limits | None = None
) -> ServerPolicy:
    """The policy at its endpoint, after a few requests that show what the server can do.

    A server applies what its model's generation config sets and a request does not name (top-k, a
    repetition penalty): start vLLM with `--generation-config vllm`.

    Args:
        adapter: the adapter's folder, under a path that the server sees, too; None: the base alone.

    Raises:
        UserError: the address or the key cannot be used, the server gives no usable answer, or the
            adapter cannot be loaded or changes no answer.
    """
    return run_async(_open(open_endpoint(settings, limits), settings, adapter))


async def _open(endpoint: Endpoint, settings: PolicySettings, adapter: Path | None) -> ServerPolicy:
    base = settings.served_name
    async with endpoint.connect(endpoint.limits.start) as connection:
        support = await probe(connection, base)
        if not support.varies:
            _log.warning(
                "%s: %s gives one answer at temperature 1 for every seed; does it ignore the "
                "temperature? (transformers: do_sample in generation_config.json)",
                endpoint.url,
                base,
            )
        if adapter is None:
            return ServerPolicy(endpoint, base, support, settings=settings)
        served = ServedAdapter.of(adapter, base)
        await served.load(connection)
    policy = ServerPolicy(endpoint, base, support, served, settings)
    async with endpoint.connect() as connection:  # a new adapter may take minutes
        await _check_adapter(policy, served, connection)
    return policy


async def _check_adapter(
    policy: ServerPolicy, adapter: ServedAdapter, connection: Connection
) -> None:
    """Check, by the reply's name and its log-probabilities, that the adapter is what answers.

    Raises:
        UserError: it is not, or the server does not answer.
    """
    comparable, endpoint = policy.support.logprobs, policy.endpoint
    body = partial(
        policy.support.body,
        asked=(PROBE,),
        max_tokens=PROBE_TOKENS,
        temperature=0.0 if comparable else 1.0,
    )
    try:
        tuned = await policy.reply(connection, body(adapter.name))
        if comparable:
            base, again = [await connection.ask(body(adapter.base)) for _ in range(2)]
            adapter.check_acts(endpoint, base.choices[0], again.choices[0], tuned.choices[0])
    except Fault as fault:
        raise endpoint.explain(fault) from None
