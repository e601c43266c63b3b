"""What the workers of a pool are given to do in tests: a module of its own, since they import it."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from constitutions.errors import UserError
from models.policy import Progress
from models.pools.base import Where


def open_nothing(where: Where) -> str:
    return "an engine"


def open_badly(where: Where) -> str:
    raise UserError("it has no wheels", where="engine", expected="four", fix="buy some")


def describe(engine: str, shard: Sequence[int], tick: Progress) -> list[str]:
    tick(len(shard))
    return [f"{engine}: {item}" for item in shard]


def raise_at_two(engine: str, shard: Sequence[int], tick: Progress) -> list[str]:
    if 2 in shard:
        raise ZeroDivisionError("two is too much")
    return describe(engine, shard, tick)


def die_at_two(engine: str, shard: Sequence[int], tick: Progress) -> list[str]:
    if 2 in shard:
        os.kill(os.getpid(), signal.SIGKILL)
    return describe(engine, shard, tick)
