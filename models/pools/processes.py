"""The pool of processes on this machine: for what needs neither an accelerator nor a server."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import Any

from constitutions.errors import UserError
from models.engine import threads
from models.policy import Progress
from models.pools.base import Compute, E, Finished, Opener, Pool, Row, Shards
from models.pools.local import LocalPool

AHEAD = 2
"""Shards that are handed out, for each process: one is computed while the next one waits."""


class ProcessPool(Pool[E]):
    """One engine in each of several processes; this process computes where there are few shards.

    Args:
        opener: opens an engine; pickled, like what is computed.
        worth: shards for each process at least: importing what it needs takes as long as some.
    """

    def __init__(self, opener: Opener[E], worth: int = 16) -> None:
        self._opener, self._worth = opener, worth
        self._here = LocalPool(lambda: opener(str))

    def map(self, compute: Compute[E, Row], shards: Shards, tick: Progress) -> Iterator[Finished]:
        """See `Pool.map`.

        Raises:
            UserError: a process was killed, for want of memory perhaps.
        """
        count = min(threads.cores(), len(shards) // self._worth)
        if count < 2:
            yield from self._here.map(compute, shards, tick)
            return
        spawn = multiprocessing.get_context("spawn")  # a fork would copy threads' locks as they are
        workers = ProcessPoolExecutor(count, spawn, _open, (self._opener,))
        try:
            for shard, units in _handed_out(workers, compute, shards, count * AHEAD):
                tick(units)
                yield shard
        except BrokenProcessPool:
            raise UserError(
                "a process that computes shards was killed",
                where=f"one of {count} on this machine",
                expected="enough memory for all of them",
                fix="the same command goes on at the shards that are missing",
            ) from None
        finally:
            workers.shutdown(cancel_futures=True)

    def close(self) -> None:
        """See `Pool.close`."""
        self._here.close()


def _handed_out(
    workers: ProcessPoolExecutor, compute: Callable[..., Any], shards: Shards, most: int
) -> Iterator[tuple[Finished, int]]:
    """Finished shards and their units of progress; no more than `most` of them are in memory."""
    left = iter(shards.items())
    waiting = set[Future[tuple[Finished, int]]]()
    while True:
        for number, shard in islice(left, most - len(waiting)):
            waiting.add(workers.submit(_computed, compute, number, shard))
        if not waiting:
            return
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


# In a process of the pool --------------------------------------------------------------------

_engine: Any = None


def _open(opener: Opener[Any]) -> None:
    """Open the engine; end with the process that asked, however that ends."""
    global _engine
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _engine = opener(str)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _computed(
    compute: Compute[Any, Row], number: int, shard: Sequence[Any]
) -> tuple[Finished, int]:
    """A shard's rows, and the units of progress that they are."""
    ticks, started = list[int](), time.monotonic()
    rows = list(compute(_engine, list(shard), ticks.append))
    return Finished(number, rows, time.monotonic() - started), sum(ticks)
