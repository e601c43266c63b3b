"""Win rates with their uncertainty: how often an answer beats the one it is compared with.

`evaluate` calls this; it needs nothing but the outcomes, so that any judge's verdicts fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """A win rate in [0, 1] with its 95 % interval; ½ is parity. n = wins + ties + losses."""

    rate: float
    low: float
    high: float
    p_value: float
    """Two-sided sign test of "wins and losses are equally likely"; ties take no side."""
    wins: int
    ties: int
    losses: int
    failed: int
    """Failed judgements: counted here, and part of no other figure."""
    n: int


class NoOutcomeError(ValueError):
    """There is nothing to average: no comparison at all, or every judgement failed."""


def win_rate(outcomes: Sequence[float | None], *, seed: int, resamples: int = 10_000) -> WinRate:
    """The mean outcome over prompts, with a bootstrap interval and a sign test.

    Args:
        outcomes: one per prompt: 1 a win, ½ a tie, 0 a loss, any value between for a judge that
            gives probabilities; None is a failed judgement.
        seed: seeds the bootstrap.
        resamples: bootstrap samples of the prompts.

    Returns:
        The rate and its percentile interval. The interval of unanimous outcomes is a point: the
        bootstrap cannot imagine an outcome that was never seen.

    Raises:
        NoOutcomeError: when no outcome is left.
        ValueError: when an outcome is outside [0, 1] (NaN too).
    """
    judged = np.array([o for o in outcomes if o is not None], dtype=float)
    failed = len(outcomes) - len(judged)
    if not len(judged):
        raise NoOutcomeError(f"no outcome to average: {failed} judgements, all failed")
    if not ((judged >= 0) & (judged <= 1)).all():
        raise ValueError("every outcome must lie in [0, 1]")
    wins, losses = int((judged > 0.5).sum()), int((judged < 0.5).sum())
    low, high = _bootstrap(judged, seed, resamples)
    return WinRate(
        rate=float(judged.mean()),
        low=low,
        high=high,
        p_value=_sign_test(wins, losses),
        wins=wins,
        ties=len(judged) - wins - losses,
        losses=losses,
        failed=failed,
        n=len(judged),
    )


def _bootstrap(outcomes: np.ndarray, seed: int, resamples: int) -> tuple[float, float]:
    """Percentile interval of the mean over resampled prompts.

    Outcomes take few distinct values, and only their counts matter: a resample is one draw from a
    multinomial, which is the same distribution as drawing prompts one by one.
    """
    values, counts = np.unique(outcomes, return_counts=True)
    n = len(outcomes)
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws @ values / n, [tail, 1 - tail])
    return float(low), float(high)


def _sign_test(wins: int, losses: int) -> float:
    """Exact two-sided binomial p-value; 1 when nothing was decided."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
