"""The pool of one engine, in this process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator

from models.policy import Progress
from models.pools.base import Compute, E, Finished, Pool, Row, Shards


class LocalPool(Pool[E]):
    """One engine, in this process; shards in their order, progress as it is made."""

    def __init__(self, opener: Callable[[], E]) -> None:
        self._opener = opener
        self._engine: E | None = None

    def map(self, compute: Compute[E, Row], shards: Shards, tick: Progress) -> Iterator[Finished]:
        """See `Pool.map`."""
        for number, shard in shards.items():
            if self._engine is None:
                self._engine = self._opener()
            started = time.monotonic()
            rows = compute(self._engine, list(shard), tick)
            yield Finished(number, rows, time.monotonic() - started)

    def close(self) -> None:
        """See `Pool.close`."""
        self._engine = None
        gc.collect()
