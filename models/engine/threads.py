"""How many CPU threads compute: stated, so that rounding does not depend on what ran before.

A sum that is split among threads is rounded otherwise than one that is not. What is recorded as a
number is computed under `pinned`, or by a model that `load_policy` or `load_reward_model` loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache


@cache
def cores() -> int:
    """The physical cores that this process may use, whatever OMP_NUM_THREADS says."""
    import psutil

    return min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))


def use(threads: int | None) -> None:
    """Let torch compute with so many threads from now on; None: `cores`."""
    import torch

    torch.set_num_threads(threads or cores())


@contextmanager
def pinned(threads: int | None = 1, *, load: bool = True) -> Iterator[None]:
    """Within the block torch, BLAS, OpenMP and numba use so many threads; None: `cores`.

    As many as before are used after it.

    Args:
        load: SciPy's and scikit-learn's libraries too, which are limited only once they are loaded.
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
