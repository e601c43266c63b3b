"""Shards over engines: in this process, or one engine each in the workers of a Ray cluster.

A stage says how an engine is opened and what is computed from a shard with it; a pool yields the
shards as they are finished, and `tasks.record.work` keeps each. What comes out is the same in every
pool: a shard is computed by one engine from beginning to end.
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Generic, NamedTuple, TypeVar

from constitutions.errors import UserError
from models.policy import PolicySettings, PoolSettings, Progress

E = TypeVar("E")
Row = TypeVar("Row")
Shards = Mapping[int, Sequence[Any]]
"""Number → items."""

Where = Callable[[str], str]
"""What the driver calls a model → what this node calls it: a folder may lie elsewhere here."""
Opener = Callable[[Where], E]
"""Opens an engine. Ray pickles it: a `partial` of a module's function and plain arguments."""
Compute = Callable[[E, Sequence[Any], Progress], Sequence[Row]]
"""(engine, shard, progress) to the shard's rows. Ray pickles it, too."""


class Finished(NamedTuple):
    """A shard's rows; `seconds` of computing, where it was computed."""

    number: int
    rows: Sequence[Any]
    seconds: float


class Pool(ABC, Generic[E]):
    """Computes shards. Engines are opened when there is something to compute, and freed at the end
    of the `with` block, whose several calls of `map` share them."""

    @abstractmethod
    def map(self, compute: Compute[E, Row], shards: Shards, tick: Progress) -> Iterator[Finished]:
        """Each shard when it is finished, in any order; `tick` counts what `compute` counts.

        Raises:
            UserError: an engine cannot be opened, or a worker is lost again and again.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the engines; a later `map` would open them again."""

    def __enter__(self) -> Pool[E]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
            rows = compute(self._engine, shard, tick)
            yield Finished(number, rows, time.monotonic() - started)

    def close(self) -> None:
        """See `Pool.close`."""
        self._engine = None
        gc.collect()


def here(model: str) -> str:
    """The `Where` of this process."""
    return model


def open_pool(
    settings: PolicySettings, opener: Opener[E], *, models: Sequence[str], local: bool = False
) -> Pool[E]:
    """The pool that the settings ask for.

    Args:
        models: what the opener asks `Where` for: their folders are brought to the nodes.
        local: in this process whatever the settings say: the model answers elsewhere.

    Raises:
        UserError: Ray is asked for and not installed.
    """
    if local or settings.pool.kind == "local":
        return LocalPool(lambda: opener(here))
    check_pool(settings.pool)
    from models.pools.ray_cluster import RayPool

    return RayPool(settings, opener, models)


def check_pool(settings: PoolSettings) -> str:
    """Where shards are computed, in words; starts and joins nothing.

    Raises:
        UserError: Ray is asked for and not installed.
    """
    if settings.kind == "local":
        return "this process"
    if find_spec("ray") is None:
        raise UserError(
            "Ray is not installed",
            where="setting 'pool' = ray",
            expected="the package ray",
            fix="from the checkout: pip install -e '.[ray]'; or set it to local",
        )
    count = f"{settings.workers:,} workers" if settings.workers else "a worker for each GPU"
    return f"{count} of Ray, {settings.address or 'on this machine'}"
