"""This machine's processor as a row of `flows.plan.cost.GPUS`, measured in about a second.

What a datasheet says of a GPU is found here by computing: how fast matrices are multiplied, how
fast memory is copied, and what starting a layer's operations costs, which decides for small models.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

from flows.plan.cost import GIB, RESERVED, Efficiency, Gpu
from models.engine import threads

CPU = "cpu"
"""The name of this machine's processor beside the names of GPUS."""
MOST_ROWS = 256
"""As `models.engine.base` has it for a processor."""
SECONDS = 0.25
"""How long each of the four measurements lasts."""
SIZE = 768
"""Rows and columns of the matrices that are multiplied."""
SHARES = Efficiency(decode=0.5, prefill=0.7, training=0.6, layer_seconds=0.0)
OPERATIONS = 40
"""Small operations that a layer of a decoding step starts: norms, projections, the rotation of
positions, the cache, attention, the adapter."""


@cache
def this_machine(cores: int | None = None) -> Gpu:
    """The processor with so many threads (None: as many as stages use), measured now.

    Its rates are those of the fastest calls, so that an estimate is the least that a run takes. The
    shares of them that a model reaches, `SHARES`, are guesses: `python -m benchmarks.plan` compares
    the outcome with what stages took.
    """
    import psutil
    import torch

    with threads.pinned(cores, load=False), torch.inference_mode():
        rates = {}
        for dtype in (torch.float32, torch.bfloat16):
            large = torch.randn(SIZE, SIZE, dtype=dtype)
            rates[dtype] = 2 * SIZE**3 / _seconds(partial(torch.matmul, large, large)) / 1e12
        source, copy = torch.zeros(1 << 26), torch.zeros(1 << 26)
        copied = _seconds(partial(copy.copy_, source))
        small = torch.randn(16, 64)
        started = _seconds(partial(torch.add, small, small))
    return Gpu(
        CPU,
        psutil.virtual_memory().available / GIB + RESERVED,
        bandwidth=2 * source.nbytes / copied / 1e9,
        bfloat16=rates[torch.bfloat16],
        float32=rates[torch.float32],
        efficiency=replace(SHARES, layer_seconds=OPERATIONS * started),
        most_rows=MOST_ROWS,
    )


def _seconds(run: Callable[[], object]) -> float:
    """Of one call, the fastest of as many as the time allows: others may be computing, too."""
    run()
    least, end = float("inf"), time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < end:
        run()
        least = min(least, time.perf_counter() - start)
    return least
