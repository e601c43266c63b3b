"""What a benchmark returns, and how to time things fairly on a machine that is never quiet."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Us beside the peer: `ratio` says how many times better we are, whatever the unit."""

    ratio: float
    ours: float
    peer: float
    unit: str
    details: dict[str, float | int | str] = field(default_factory=dict)
    """What else was measured in the same run, and on what."""


Clock = Callable[[], float]
"""`time.perf_counter`, or `time.process_time` for work that keeps to one core: it does not count
the time that other processes took."""


def interleaved(
    functions: dict[str, Callable[[], object]], rounds: int, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each function, all of them called once in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(timed(function, clock))
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(function: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Seconds of one call."""
    start = clock()
    function()
    return clock() - start
