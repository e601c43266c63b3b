"""Shards over engines: what a stage asks of a pool, wherever the shards are computed.

A stage says how an engine is opened and what is computed from a shard with it; a pool yields the
shards as they are finished, and `tasks.record.work` keeps each. What comes out is the same in every
pool: one engine computes a shard from beginning to end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from models.policy import Progress

E = TypeVar("E")
Row = TypeVar("Row")
Shards = Mapping[int, Sequence[Any]]
"""Number → items."""

Where = Callable[[str], str]
"""What the driver calls a model → what this node calls it: its folder may have another path here.
"""
Opener = Callable[[Where], E]
"""Opens an engine. Ray pickles it: a `partial` of a module's function and plain arguments."""
Compute = Callable[[E, Sequence[Any], Progress], Sequence[Row]]
"""(engine, shard, progress) to the shard's rows. Ray pickles it, too."""


class Finished(NamedTuple):
    """A shard's rows, and the `seconds` that its worker computed."""

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
            UserError: an engine cannot be opened, or workers are lost repeatedly.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the engines; a later `map` opens them again."""

    def __enter__(self) -> Pool[E]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
