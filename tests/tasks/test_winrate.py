"""Win rates against hand computation, brute force and known coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tasks.winrate import NoOutcomeError, win_rate


def test_rate_counts_a_tie_as_half() -> None:
    result = win_rate([1, 1, 1, 0.5, 0], seed=0)
    assert result.rate == pytest.approx(3.5 / 5)
    assert (result.wins, result.ties, result.losses, result.n) == (3, 1, 1, 5)
    assert result.low <= result.rate <= result.high


def test_failed_judgements_are_excluded_and_counted() -> None:
    with_failures = win_rate([1, None, 0, 1, None, 0.5], seed=0)
    assert with_failures.failed == 2
    assert with_failures.n == 4
    assert with_failures.rate == win_rate([1, 0, 1, 0.5], seed=0).rate == 0.625


@pytest.mark.parametrize("outcomes", [[], [None], [None, None]])
def test_nothing_to_average_raises(outcomes: list[float | None]) -> None:
    with pytest.raises(NoOutcomeError):
        win_rate(outcomes, seed=0)


@pytest.mark.parametrize("outcome", [math.nan, -0.1, 1.1])
def test_an_impossible_outcome_raises(outcome: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        win_rate([1, outcome], seed=0)


@pytest.mark.parametrize("counts", [(60, 10, 30), (18, 2, 5), (3, 90, 7)])
def test_interval_equals_a_brute_force_bootstrap(counts: tuple[int, int, int]) -> None:
    outcomes = np.repeat([1, 0.5, 0], counts)
    rng = np.random.default_rng(7)
    means = rng.choice(outcomes, size=(40_000, len(outcomes))).mean(axis=1)
    result = win_rate(outcomes.tolist(), seed=1, resamples=40_000)
    step = 0.5 / len(outcomes)
    assert np.quantile(means, [0.025, 0.975]) == pytest.approx([result.low, result.high], abs=step)


def test_interval_covers_the_true_rate_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    truth = 0.55 + 0.5 * 0.2
    samples = rng.choice([1, 0.5, 0], p=[0.55, 0.2, 0.25], size=(1_000, 200))
    results = [win_rate(row.tolist(), seed=i, resamples=1_000) for i, row in enumerate(samples)]
    covered = np.mean([r.low <= truth <= r.high for r in results])
    assert 0.93 <= covered <= 0.97


def test_swapping_the_sides_gives_the_complement() -> None:
    outcomes = [1, 1, 0.5, 0, 1, 0.5, None, 1]
    swapped = [None if o is None else 1 - o for o in outcomes]
    ours, theirs = win_rate(outcomes, seed=0), win_rate(swapped, seed=0)
    assert theirs.rate == 1 - ours.rate
    assert theirs.p_value == ours.p_value
    assert (theirs.wins, theirs.losses) == (ours.losses, ours.wins)


def test_interval_narrows_with_more_prompts_and_repeats_with_the_seed() -> None:
    few, many = (win_rate([1, 0, 0.5, 1] * k, seed=5) for k in (10, 250))
    assert many.high - many.low < 0.3 * (few.high - few.low)
    assert win_rate([1, 0, 0.5, 1] * 10, seed=5) == few


def test_sign_test_ignores_ties() -> None:
    # P(X ≤ 1 or X ≥ 7 | n = 8, ½) = 2 · (1 + 8) / 256
    assert win_rate([1] * 7 + [0] + [0.5] * 50, seed=0).p_value == pytest.approx(18 / 256)
    assert win_rate([0.5, 0.5], seed=0).p_value == 1.0
