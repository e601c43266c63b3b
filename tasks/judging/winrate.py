"""Win rates with their uncertainty: how often an answer beats the one it is compared with.

`evaluate` calls this; it needs nothing but the outcomes, so that any judge's verdicts fit. A judge
that reads a pair in both orders has its two verdicts settled first: `settle`, then `win_rate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class Mean(NamedTuple):
    """A mean with its 95 % interval."""

    rate: float
    low: float
    high: float


class NoOutcomeError(ValueError):
    """There is nothing to average: no comparison at all, or every judgement failed."""


class TooManyFailedError(ValueError):
    """More judgements failed than the caller accepts: the rest may be no fair sample."""


def win_rate(
    outcomes: Sequence[float | None],
    *,
    seed: int,
    resamples: int = 10_000,
    max_failed: float = 1.0,
) -> WinRate:
    """The mean outcome over prompts, with a bootstrap interval and a sign test.

    Args:
        outcomes: one per prompt: 1 a win, ½ a tie, 0 a loss, any value between for a judge that
            gives probabilities; None is a failed judgement.
        seed: seeds the bootstrap.
        resamples: bootstrap samples of the prompts.
        max_failed: the largest share of failed judgements, in [0, 1], that still gives a rate.

    Returns:
        The rate and its percentile interval. From 400 prompts on it covers a true rate between
        0.05 and 0.95 in 92–96 % of samples, of 100 prompts in 88 % at least. The interval of
        unanimous outcomes is a point: the bootstrap cannot imagine an outcome that was never seen.

    Raises:
        NoOutcomeError: when no outcome is left.
        TooManyFailedError: when more than the share `max_failed` failed.
        ValueError: when an outcome is outside [0, 1] (NaN too).
    """
    judged = np.array([o for o in outcomes if o is not None], dtype=float)
    failed = len(outcomes) - len(judged)
    if not len(judged):
        raise NoOutcomeError(f"no outcome to average: {failed} judgements, all failed")
    if failed / len(outcomes) > max_failed:
        raise TooManyFailedError(
            f"{failed} of {len(outcomes)} judgements failed, more than {max_failed:.0%}"
        )
    if not ((judged >= 0) & (judged <= 1)).all():
        raise ValueError("every outcome must lie in [0, 1]")
    wins, losses = int((judged > 0.5).sum()), int((judged < 0.5).sum())
    low, high = _bootstrap(judged, seed, resamples)
    return WinRate(
        rate=_rate(judged),
        low=low,
        high=high,
        p_value=_sign_test(wins, losses),
        wins=wins,
        ties=len(judged) - wins - losses,
        losses=losses,
        failed=failed,
        n=len(judged),
    )


class BothOrders(NamedTuple):
    """What a judge said of one pair in its two orders; None where that judgement failed.

    Both are outcomes of *our* answer: 1 it won, ½ a tie, 0 it lost.
    """

    ours_first: float | None
    ours_second: float | None


def settle(pair: BothOrders) -> float | None:
    """One outcome of two judgements: what they agree on, or a tie where the orders disagree.

    Probabilities agree when they favour the same side; the outcome is then their mean. A pair of
    which either judgement failed has none: the other alone would carry the bias of its order.
    """
    first, second = pair
    if first is None or second is None:
        return None
    return (first + second) / 2 if _side(first) == _side(second) else 0.5


class OrderEffect(NamedTuple):
    """How far a judge's verdicts depend on which answer it reads first."""

    bias: float
    """In [-1, 1]: the share of pairs of which the first place won both times, less that of which
    the second place did. 1 always says "first"; a judge that guesses is near 0. A win against a
    tie counts as half such a pair."""
    consistency: float
    """The share of pairs, in [0, 1], on which both orders favour the same side."""


def order_effect(pairs: Sequence[BothOrders]) -> OrderEffect:
    """The position bias and the consistency of a judge that read every pair in both orders.

    Pairs with a failed judgement are left out.

    Raises:
        NoOutcomeError: when no pair was judged in both orders.
    """
    judged = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not judged:
        raise NoOutcomeError(f"no pair was judged in both orders: {len(pairs)} failed")
    return OrderEffect(
        bias=float(np.mean([a - b for a, b in judged])),
        consistency=float(np.mean([_side(a) == _side(b) for a, b in judged])),
    )


class JudgeAgreement(NamedTuple):
    """How far two judges agree on win, tie or loss."""

    kappa: float | None
    """Cohen's κ: 1 is full agreement, 0 what chance gives; None where chance alone would already
    agree on everything (both judges always say the same one thing)."""
    observed: float
    """The share of pairs, in [0, 1], on which they say the same."""


def agreement(first: Sequence[float | None], second: Sequence[float | None]) -> JudgeAgreement:
    """Cohen's κ = (p_o - p_e) / (1 - p_e) of two judges' outcomes; a tie is a class of its own.

    Pairs on which either judge failed are left out.

    Args:
        first, second: the judges' outcomes in [0, 1], pair by pair; None is a failed judgement.

    Raises:
        NoOutcomeError: when there is no pair that both judged.
        ValueError: when the lengths differ.
    """
    both = [
        (_side(a), _side(b))
        for a, b in zip(first, second, strict=True)
        if a is not None and b is not None
    ]
    if not both:
        raise NoOutcomeError(f"no pair that both judges judged, of {len(first)}")
    said = np.array(both)
    observed = float((said[:, 0] == said[:, 1]).mean())
    expected = sum(float(np.prod((said == side).mean(axis=0))) for side in (-1, 0, 1))
    return JudgeAgreement(
        kappa=(observed - expected) / (1 - expected) if expected < 1 else None,
        observed=observed,
    )


def _side(outcome: float) -> int:
    """Whom an outcome favours: 1 ours, 0 neither, -1 theirs."""
    return (outcome > 0.5) - (outcome < 0.5)


def _rate(outcomes: np.ndarray) -> float:
    """The mean, so rounded that swapping the sides gives one minus it to the last bit.

    1 - r is exact in floating point for r in [½, 1] only: a smaller mean is taken from above.
    """
    rate = float(outcomes.mean())
    return rate if rate >= 0.5 else 1 - float((1 - outcomes).mean())


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
