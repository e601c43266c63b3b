"""The pool that the settings ask for: `tasks.policies` and `models.judges` open theirs here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from constitutions.errors import UserError
from models.policy import PolicySettings, PoolSettings
from models.pools.base import E, Opener, Pool
from models.pools.local import LocalPool


def open_pool(settings: PolicySettings, opener: Opener[E], *, models: Sequence[str]) -> Pool[E]:
    """The pool that the settings ask for; this process, where a server computes.

    Args:
        models: what the opener asks `Where` for: their folders are copied to the nodes.

    Raises:
        UserError: Ray is asked for and not installed.
    """
    if not settings.in_ray:
        return LocalPool(lambda: opener(str))
    check_pool(settings.pool)
    from models.pools.ray_cluster import RayPool

    return RayPool(settings, opener, models)


def check_pool(settings: PoolSettings) -> str:
    """Where Ray computes shards, in words; starts and joins nothing.

    Raises:
        UserError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise UserError(
            "Ray is not installed",
            where="setting 'pool' = ray",
            expected="the package ray",
            fix="from the checkout: pip install -e '.[ray]'; or set it to local",
        )
    count = f"{settings.workers:,} workers" if settings.workers else "a worker for each GPU"
    return f"{count} of Ray, {settings.address or 'on this machine'}"
