"""Win rates against hand computation, brute force and known coverage."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import binom

from tasks.judging.winrate import (
    BothOrders,
    NoOutcomeError,
    TooManyFailedError,
    agreement,
    order_effect,
    settle,
    win_rate,
)


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


# Statistics against known answers


@pytest.mark.parametrize(("n", "least"), [(100, 0.88), (400, 0.92)])
def test_how_often_the_interval_covers_the_truth(n: int, least: float) -> None:
    """Every possible result of n decided comparisons, weighed by its probability."""
    wins = np.arange(n + 1)
    results = [win_rate([1] * k + [0] * (n - k), seed=int(k), resamples=4_000) for k in wins]
    for rate in np.arange(0.05, 0.951, 0.003):
        covered = [r.low <= rate <= r.high for r in results]
        assert least <= binom.pmf(wins, n, rate) @ covered <= 0.965, rate


def test_interval_covers_a_mean_of_probabilities() -> None:
    values, chances = np.array([0.02, 0.2, 0.7, 0.97]), [0.5, 0.2, 0.2, 0.1]
    samples = np.random.default_rng(4).choice(values, p=chances, size=(1_000, 200))
    results = [win_rate(row.tolist(), seed=i, resamples=1_000) for i, row in enumerate(samples)]
    assert 0.93 <= np.mean([r.low <= values @ chances <= r.high for r in results]) <= 0.97


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, None]), min_size=1))
def test_swapping_gives_the_complement_to_the_last_bit(outcomes: list[float | None]) -> None:
    assume(any(o is not None for o in outcomes))
    ours = win_rate(outcomes, seed=0, resamples=1)
    theirs = win_rate([None if o is None else 1 - o for o in outcomes], seed=0, resamples=1)
    assert theirs.rate == 1 - ours.rate and ours.rate == 1 - theirs.rate
    assert ours.rate == pytest.approx((ours.wins + ours.ties / 2) / ours.n)


def test_more_failures_than_accepted_raise() -> None:
    outcomes = [1, 0, 1, None, 0, 1, 0.5, 0, 1, None]
    assert win_rate(outcomes, seed=0, max_failed=0.2).failed == 2
    with pytest.raises(TooManyFailedError, match="2 of 10 judgements failed, more than 19%"):
        win_rate(outcomes, seed=0, max_failed=0.19)


# Both orders

Judge = Callable[[str, str], float | None]
"""(first, second) to the outcome of the first."""


def read_twice(judge: Judge, pairs: list[tuple[str, str]]) -> list[BothOrders]:
    """What the judge says of ours, shown first and shown second."""
    first = [judge(ours, theirs) for ours, theirs in pairs]
    second = [judge(theirs, ours) for ours, theirs in pairs]
    return [BothOrders(a, None if b is None else 1 - b) for a, b in zip(first, second, strict=True)]


def longest(first: str, second: str) -> float:
    return 0.5 + 0.5 * ((len(first) > len(second)) - (len(first) < len(second)))


PAIRS = [("aaa", "a"), ("a", "aa"), ("aa", "bb"), ("aaaa", "a"), ("", "a"), ("aa", "a")]


@pytest.mark.parametrize(("verdict", "bias"), [(1.0, 1.0), (0.0, -1.0)])
def test_a_judge_that_always_names_one_place_yields_half_and_is_found_out(
    verdict: float, bias: float
) -> None:
    games = read_twice(lambda first, second: verdict, PAIRS)
    assert win_rate([settle(g) for g in games], seed=0).rate == 0.5
    effect = order_effect(games)
    assert (effect.bias, effect.consistency) == (bias, 0.0)


def test_a_judge_that_reads_the_answers_has_no_bias() -> None:
    games = read_twice(longest, PAIRS)
    assert [settle(g) for g in games] == [1, 0, 0.5, 1, 0, 1]
    effect = order_effect(games)
    assert (effect.bias, effect.consistency) == (0.0, 1.0)


def test_a_judge_that_guesses_is_inconsistent_but_not_biased() -> None:
    rng = np.random.default_rng(2)
    games = read_twice(lambda first, second: float(rng.random() < 0.5), PAIRS * 1_000)
    effect = order_effect(games)
    assert effect.bias == pytest.approx(0, abs=0.03)
    assert effect.consistency == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        (1, 1, 1),
        (0, 0, 0),
        (0.5, 0.5, 0.5),
        (1, 0, 0.5),
        (0, 1, 0.5),
        (1, 0.5, 0.5),
        (0.9, 0.7, 0.8),
        (0.9, 0.2, 0.5),
        (None, 1, None),
        (0, None, None),
        (None, None, None),
    ],
)
def test_two_judgements_settle_to_agreement_or_a_tie(
    first: float | None, second: float | None, outcome: float | None
) -> None:
    assert settle(BothOrders(first, second)) == pytest.approx(outcome)


def test_swapping_the_answers_changes_no_figure_of_the_judge() -> None:
    def leaning(first: str, second: str) -> float | None:
        """The longer answer, or the first of two that are about equal; mute on the empty."""
        return None if not first else 1.0 if len(first) + 1 >= len(second) else 0.0

    games = read_twice(leaning, PAIRS)
    mirror = read_twice(leaning, [(theirs, ours) for ours, theirs in PAIRS])
    ours, theirs = (win_rate([settle(g) for g in side], seed=0) for side in (games, mirror))
    assert theirs.rate == 1 - ours.rate and ours.failed == theirs.failed == 1
    assert order_effect(games) == order_effect(mirror)
    assert order_effect(games).bias == pytest.approx(3 / 5)


def test_no_pair_judged_twice_has_no_order_effect() -> None:
    with pytest.raises(NoOutcomeError, match="2 failed"):
        order_effect([BothOrders(None, 1), BothOrders(0, None)])


# Agreement of judges


def test_kappa_by_hand() -> None:
    """Observed 4/6; by chance (3·3 + 1·2 + 2·1) / 36 = 13/36."""
    result = agreement([1, 1, 1, 0.5, 0, 0, None, 1], [1, 1, 0.5, 0.5, 0, 1, 1, None])
    assert result.observed == pytest.approx(4 / 6)
    assert result.kappa == pytest.approx((24 / 36 - 13 / 36) / (23 / 36))


def test_kappa_is_scikit_learns() -> None:
    from sklearn.metrics import cohen_kappa_score

    first, second = np.random.default_rng(8).integers(0, 3, size=(2, 300)) / 2
    second[:150] = first[:150]
    expected = cohen_kappa_score(first.astype(str), second.astype(str))
    assert agreement(first.tolist(), second.tolist()).kappa == pytest.approx(expected)


def test_kappa_knows_its_landmarks() -> None:
    judge = [1, 0, 0.5, 1, 0, 0.5]
    assert agreement(judge, judge).kappa == pytest.approx(1)
    assert agreement([1, 1, 0, 0], [1, 0, 1, 0]).kappa == pytest.approx(0)
    assert agreement([1, 0], [0, 1]).kappa == pytest.approx(-1)
    always = agreement([1, 1, 1], [1, 1, 1])
    assert always.kappa is None and always.observed == 1
    assert agreement([0.9, 0.2], [1, 0]).observed == 1  # probabilities count by their side


def test_judges_without_a_pair_in_common_have_no_agreement() -> None:
    with pytest.raises(NoOutcomeError, match="of 2"):
        agreement([None, 1], [0, None])
    with pytest.raises(ValueError, match="shorter"):
        agreement([1, 0], [1])
