"""The headline of an experiment: the one win rate that the command line and the report name.

It is the method's final answer against the initial policy's, with its interval, its judge, and the
rate at equal lengths beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tasks.record.work import Metrics


class Rate(NamedTuple):
    """A win rate in [0, 1] and its 95 % interval."""

    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        """ "0.95 [0.92, 0.97]"."""
        return f"{self.rate:.2f} [{self.low:.2f}, {self.high:.2f}]"


class Headline(NamedTuple):
    """What an experiment found, as of its last evaluated iteration."""

    iteration: int
    rate: Rate
    equal_lengths: Rate | None
    """What it would be if both answers were equally long; None where that is undefined."""
    compared: str
    """What is compared with what."""
    judge: str

    def __str__(self) -> str:
        """The whole headline as a sentence."""
        same = f", {self.equal_lengths} at equal lengths" if self.equal_lengths else ""
        return (
            f"Win rate {self.rate}{same}: {self.compared}, iteration {self.iteration}, "
            f"judge {self.judge}."
        )

    def facts(self) -> dict[str, object]:
        """The same for a program."""
        same = self.equal_lengths
        return {
            **self._asdict(),
            "rate": self.rate._asdict(),
            "equal_lengths": same and same._asdict(),
        }


def rate_of(metrics: Mapping[str, float], name: str) -> Rate | None:
    """A measured rate; None where it was not measured."""
    ends = (name, f"{name}_low", f"{name}_high")
    return Rate(*(metrics[end] for end in ends)) if set(ends) <= set(metrics) else None


def headline(
    metric: str, history: Mapping[int, Metrics], *, compared: str, judge: str
) -> Headline | None:
    """The headline of the last iteration that has the metric; None without one.

    Args:
        metric: the method's `headline`.
        history: iteration → its figures.
    """
    for t in sorted(history, reverse=True):
        if rate := rate_of(history[t], metric):
            same = rate_of(history[t], f"{metric}_length_controlled")
            return Headline(t, rate, same, compared, judge)
    return None
