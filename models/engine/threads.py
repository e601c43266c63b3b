"""Fixes the number of CPU threads, because rounding depends on it.

A sum that is split among more threads is rounded differently. Recorded numbers are computed under
`pinned`, or by a model from `load_policy` or `load_reward_model`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache


@cache
def cores() -> int:
    """The number of physical cores that this process may use; OMP_NUM_THREADS is ignored."""
    import psutil

    return min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))


def use(threads: int | None) -> None:
    """Let torch use so many CPU threads from now on; None: as many as `cores`."""
    import torch

    torch.set_num_threads(threads or cores())


@contextmanager
def pinned(threads: int | None = 1, *, load: bool = True) -> Iterator[None]:
    """Within the block torch, BLAS, OpenMP and numba use so many threads; None: as many as `cores`.

    Args:
        load: import the libraries of SciPy and scikit-learn first, so that the limit covers them.
    """
    if load:
        import sklearn.utils  # noqa: F401
    from threadpoolctl import threadpool_limits

    count = threads or cores()
    with ExitStack() as after:
        after.enter_context(threadpool_limits(count))
        if torch := sys.modules.get("torch"):
            after.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(count)
        if numba := sys.modules.get("numba"):
            after.callback(numba.set_num_threads, numba.get_num_threads())
            numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
        yield
