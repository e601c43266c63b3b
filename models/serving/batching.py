"""Brings requests that arrive one by one to a policy, which answers many at once.

A thread takes all that wait together. What arrives meanwhile waits for the next batch; a request
that nobody waits for any more is dropped before it begins.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from models.policy import Completion, Messages, Policy, Request, vote

GATHER_SECONDS = 0.005
"""A batch begins when nothing has arrived for so long: clients that were answered together ask
again together, but not at the same instant."""
LONGEST_GATHERING = 0.1
"""Most seconds that a batch waits for more."""
MOST_WAITING = 2048
"""Most requests that wait."""
_log = logging.getLogger(__name__)

Said = tuple[Messages, str]
"""A conversation, and an answer to it whose probability is asked for."""
Count = Callable[[Messages], int]
"""The number of tokens of a conversation, up to the assistant's next turn."""


class Full(Exception):
    """`MOST_WAITING` requests wait already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedCompletion:
    """A completion, and the number of tokens of its prompt."""

    completion: Completion
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: Request | Said
    future: Future[Any] = field(default_factory=Future)


class Batcher:
    """The threads before a policy.

    Args:
        count: counts the tokens of prompts.
        threads: 1 for an engine, which computes one batch at a time; more for a policy behind an
            endpoint, which need not wait for the slowest answer of a batch.
        began: called with the size of each batch.
    """

    def __init__(
        self,
        policy: Policy,
        count: Count,
        *,
        threads: int = 1,
        began: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._policy, self._count, self._began = policy, count, began
        self._waiting: list[_Waiting] = []
        self._arrived, self._closed = threading.Condition(), False
        self._taking, self._counting = threading.Lock(), threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, name=f"batches {i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a batch."""
        with self._arrived:
            return sum(not w.future.cancelled() for w in self._waiting)

    def submit(self, request: Request) -> Future[CountedCompletion]:
        """The request's completion; of several, the one that has the majority (`vote`). Cancel the
        future to drop it before it begins.

        The future raises what the policy raises.

        Raises:
            Full: too many wait.
            RuntimeError: the batcher is closed.
        """
        return self._wait_for(request)

    def probability(self, messages: Messages, answer: str) -> Future[float]:
        """p(answer | messages), in [0, 1]; otherwise as `submit`."""
        return self._wait_for((messages, answer))

    def _wait_for(self, request: Request | Said) -> Future[Any]:
        waiting = _Waiting(request)
        with self._arrived:
            if self._closed:
                raise RuntimeError("no more requests are taken")
            if len(self._waiting) >= MOST_WAITING:
                self._waiting = [w for w in self._waiting if not w.future.cancelled()]
            if len(self._waiting) >= MOST_WAITING:
                raise Full
            self._waiting.append(waiting)
            self._arrived.notify()
        return waiting.future

    def close(self, seconds: float | None = None) -> None:
        """Take no more requests; end when those that wait are answered, after `seconds` at most."""
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()
        for thread in self._threads:
            thread.join(seconds)

    def _work(self) -> None:
        while (batch := self._take()) is not None:
            begun = [w for w in batch if w.future.set_running_or_notify_cancel()]
            if begun:
                self._began(len(begun))
                self._answer(begun)

    def _take(self) -> list[_Waiting] | None:
        """All that wait, as soon as there are any; None when there will be none."""
        with self._taking:
            with self._arrived:
                self._arrived.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return None
            self._gather()
            with self._arrived:
                taken, self._waiting = self._waiting, []
        return taken

    def _gather(self) -> None:
        seen, ends = 0, time.monotonic() + LONGEST_GATHERING
        while seen < len(self._waiting) and time.monotonic() < ends:
            seen = len(self._waiting)
            time.sleep(GATHER_SECONDS)

    def _answer(self, batch: Sequence[_Waiting]) -> None:
        try:
            results = self._results([w.request for w in batch])
        except Exception as error:  # the thread lives on; whoever waits learns it
            _log.debug("a batch of %d failed", len(batch), exc_info=True)
            for waiting in batch:
                waiting.future.set_exception(error)
            return
        for waiting, result in zip(batch, results, strict=True):
            waiting.future.set_result(result)

    def _results(self, requests: Sequence[Request | Said]) -> list[CountedCompletion | float]:
        """A completion of each request, and the probability of each answer that is given: 0 where
        the prompt is refused, as the next turn will say."""
        with self._counting:
            counts = [self._tokens(request) for request in requests]
        asked = [r for r in requests if isinstance(r, Request)]
        said = [r for r, n in zip(requests, counts, strict=True) if n and isinstance(r, tuple)]
        completed = iter(self._policy.generate(asked) if asked else [])
        scored = iter(self._policy.logprobs(said) if said else [])
        return [
            CountedCompletion(completion=vote(next(completed)), prompt_tokens=tokens)
            if isinstance(request, Request)
            else math.exp(next(scored).logprob if tokens else -math.inf)
            for request, tokens in zip(requests, counts, strict=True)
        ]

    def _tokens(self, request: Request | Said) -> int:
        messages = request.messages if isinstance(request, Request) else request[0]
        assert not isinstance(messages, str), "only chats are served"
        return self._count(messages)
