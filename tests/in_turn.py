"""Shards computed here, one after the other: what `Workspace.sharded` takes where no engine is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from models.pools.base import Finished, Shards


def in_turn(
    compute: Callable[[Sequence[Any]], Sequence[Any]],
) -> Callable[[Shards], Iterator[Finished]]:
    return lambda missing: (Finished(n, compute(shard), 0.0) for n, shard in missing.items())
