"""Win rates at equal lengths: what of a win rate is the answers' length?

Judges like longer answers, and training changes lengths. `tasks.judging.rates` asks for any
comparison what its win rate would be if both sides were equally long (Dubois et al. 2024, arXiv
2404.04475); `tasks.benchmarks.alpaca_eval.data` reproduces the leaderboard's own version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks.judging.winrate import CONFIDENCE, win_rate

TOLERANCE = 1e-8
STEPS = 100
LARGEST_BLOCK = 1 << 21
"""Resampled prompts fitted at once: bounds the memory at some 100 MB."""
PULL = np.array([[1.0, 0.0], [0.0, 1.0]])
"""Two observed ties that belong to no prompt, one for each coefficient: see `length_controlled`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthControlled:
    """A win rate in [0, 1] as it would be at equal lengths, with its 95 % interval."""

    rate: float
    low: float
    high: float
    coefficient: float
    """β, in logits: the effect of a length difference far beyond the standard deviation. Above 0
    the judge prefers the longer answer, below 0 the shorter; 0 where all lengths are equal."""


class LengthConfoundedError(ValueError):
    """One side is longer in every pair: no fit can separate length from quality."""


def length_controlled(
    outcomes: Sequence[float | None],
    ours: Sequence[int],
    theirs: Sequence[int],
    *,
    seed: int,
    resamples: int = 1_000,
) -> LengthControlled:
    """σ(α) of the fit  logit P(our answer wins) = α + β · tanh(Δ / std Δ).

    Δ is the length of our answer less that of theirs: positive where ours is longer. Its standard
    deviation is AlpacaEval's (of the sample, while Δ itself is not centred: 0 stays "equally
    long"), over the judged pairs, and the same in every resample. Outcomes are soft labels: a row
    counts as a win with its outcome's weight, and as a loss with the rest of it.

    Each coefficient has a log-F(1, 1) prior (Greenland & Mansournia 2015), which is half a win and
    half a loss added to the data: one such tie at equal lengths, and one at the largest difference
    where α has no part (AlpacaEval's gamed baselines are rows of that kind). Hence unanimous
    outcomes, or a judge that decides by length alone, give finite coefficients; the rate of n
    wins at equal lengths is (n + ½) / (n + 1), and the prior's weight falls as 1/n. A strength
    chosen by cross-validation, as AlpacaEval does, would be another in every resample.

    Args:
        outcomes: one per prompt, in [0, 1]; None is a failed judgement, and has no part.
        ours, theirs: lengths in characters of the two answers, prompt by prompt.
        seed: seeds the bootstrap over prompts; each resample is fitted anew.
        resamples: bootstrap samples.

    Returns:
        Rate and percentile interval; swapping the sides gives one minus the rate. The plain rate
        where no lengths differ.

    Raises:
        NoOutcomeError: when no outcome is left.
        LengthConfoundedError: one side is longer in every judged pair.
        ArithmeticError: the fit does not converge.
        ValueError: an outcome is outside [0, 1], or the numbers of rows differ.
    """
    rows = [row for row in zip(outcomes, ours, theirs, strict=True) if row[0] is not None]
    plain = win_rate(outcomes, seed=seed, resamples=resamples)
    table = np.array(rows, dtype=float)
    wins, differences = table[:, 0], table[:, 1] - table[:, 2]
    if not differences.any():
        return LengthControlled(rate=plain.rate, low=plain.low, high=plain.high, coefficient=0.0)
    if (differences > 0).all() or (differences < 0).all():
        which = "longer" if differences[0] > 0 else "shorter"
        raise LengthConfoundedError(f"our answer is {which} in every pair")
    lengths = np.tanh(standardised(differences))
    whole = _fit(lengths, wins, np.ones((1, len(wins))), np.zeros(2))
    intercept, coefficient = whole[0]
    tail = (1 - CONFIDENCE) / 2
    rates = _sigmoid(_bootstrapped(lengths, wins, whole[0], seed, resamples)[:, 0])
    low, high = np.quantile(rates, [tail, 1 - tail])
    rate = float(_sigmoid(intercept))
    return LengthControlled(
        rate=rate,
        low=min(float(low), rate),  # unanimous outcomes: all fits are one, but for rounding
        high=max(float(high), rate),
        coefficient=float(coefficient),
    )


def standardised(differences: Sequence[float] | np.ndarray) -> np.ndarray:
    """Differences of length over their sample standard deviation, not centred: 0 stays equal."""
    return np.asarray(differences) / (np.std(differences, ddof=1) if np.any(differences) else 1)


def _bootstrapped(
    lengths: np.ndarray, wins: np.ndarray, start: np.ndarray, seed: int, resamples: int
) -> np.ndarray:
    """(resamples, 2): α and β of resampled prompts."""
    n, rng = len(wins), np.random.default_rng(seed)
    block = max(LARGEST_BLOCK // n, 1)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    draws = (rng.multinomial(n, np.full(n, 1 / n), size=size).astype(float) for size in sizes)
    return np.vstack([_fit(lengths, wins, counts, start) for counts in draws])


def _fit(
    lengths: np.ndarray, wins: np.ndarray, counts: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """α and β for every row of `counts`, how often each prompt is drawn: (fits, n) → (fits, 2).

    Newton's method. Where a step does not lessen the loss it is shortened to log(1 + r) / r of
    itself, which does: logistic loss is self-concordant (Sun & Tran-Dinh 2019, theorem 2).
    """
    rows = np.vstack([np.column_stack([np.ones_like(lengths), lengths]), PULL])
    shares = np.append(wins, [0.5] * len(PULL))
    weights = np.hstack([counts, np.ones((len(counts), len(PULL)))])
    products = np.stack([rows[:, 0] ** 2, rows[:, 0] * rows[:, 1], rows[:, 1] ** 2], axis=1)
    longest = np.linalg.norm(rows, axis=1).max()

    def loss(logits: np.ndarray) -> np.ndarray:
        return (weights * (np.logaddexp(0, logits) - shares * logits)).sum(axis=1)

    found = np.tile(start, (len(counts), 1))
    logits = found @ rows.T
    lost = loss(logits)
    for _ in range(STEPS):
        expected = _sigmoid(logits)
        gradient = (weights * (shares - expected)) @ rows
        a, b, c = ((weights * expected * (1 - expected)) @ products).T
        step = np.column_stack(
            [c * gradient[:, 0] - b * gradient[:, 1], a * gradient[:, 1] - b * gradient[:, 0]]
        ) / (a * c - b * b).reshape(-1, 1)
        far = longest * np.linalg.norm(step, axis=1)
        if far.max() < TOLERANCE:
            return found
        worse = loss(logits + step @ rows.T) > lost
        step[worse] *= (np.log1p(far[worse]) / far[worse]).reshape(-1, 1)
        found += step
        logits = found @ rows.T
        lost = loss(logits)
    raise ArithmeticError(f"the length-controlled fit did not converge in {STEPS} steps")


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return np.asarray(expit(logits))
