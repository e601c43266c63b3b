"""Length control against simulated judges whose taste is known."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from tasks.judging.length_control import LengthConfoundedError, length_controlled
from tasks.judging.pairs import OUTSIDE
from tasks.judging.rates import length_metrics, win_rates
from tasks.judging.winrate import NoOutcomeError, win_rate
from tasks.rows import Comparison

Lengths = tuple[list[int], list[int]]


def lengths(n: int, longer_by: float, seed: int = 0) -> Lengths:
    """Answers of about 500 characters, ours longer on average."""
    rng = np.random.default_rng(seed)
    ours, theirs = rng.normal(500 + longer_by, 120, n), rng.normal(500, 120, n)
    return ours.astype(int).tolist(), theirs.astype(int).tolist()


def outcomes(at: Lengths, quality: float, taste: float, seed: int = 0) -> list[float | None]:
    """A judge with P(ours wins) = σ(quality + taste · tanh(Δ / std Δ)) that ties now and then."""
    rng = np.random.default_rng(seed)
    difference = np.subtract(*at)
    chance = expit(quality + taste * np.tanh(difference / difference.std(ddof=1)))
    won = (rng.random(len(chance)) < chance).astype(float)
    return np.where(rng.random(len(won)) < 0.1, 0.5, won).tolist()


def test_a_judge_that_only_likes_length_is_indifferent_at_equal_lengths() -> None:
    at = lengths(250, longer_by=150)
    always = [float(a > b) + (a == b) / 2 for a, b in zip(*at, strict=True)]
    for said, near in ((outcomes(at, quality=0, taste=4), 0.07), (always, 0.1)):
        controlled = length_controlled(said, *at, seed=0)
        assert win_rate(said, seed=0).low > 0.65
        assert controlled.rate == pytest.approx(0.5, abs=near)
        assert controlled.low < 0.5 < controlled.high and controlled.coefficient > 2


def test_of_a_judge_that_likes_brevity_the_coefficient_is_negative() -> None:
    at = lengths(400, longer_by=-150)
    said = outcomes(at, quality=0, taste=-2)
    controlled = length_controlled(said, *at, seed=0)
    assert win_rate(said, seed=0).low > 0.6 and controlled.low < 0.5 < controlled.high
    assert controlled.coefficient == pytest.approx(-2, abs=0.7)


def test_of_a_judge_indifferent_to_length_the_rate_stays() -> None:
    at = lengths(2_000, longer_by=20)
    said = outcomes(at, quality=0.8, taste=0)
    raw, controlled = win_rate(said, seed=0), length_controlled(said, *at, seed=0)
    assert controlled.rate == pytest.approx(raw.rate, abs=0.01)
    assert controlled.coefficient == pytest.approx(0, abs=0.2)


def test_without_any_difference_of_length_it_is_the_plain_rate() -> None:
    said = [1, 0.5, None, 0, 1]
    plain = win_rate(said, seed=3, resamples=1_000)
    controlled = length_controlled(said, [7] * 5, [7] * 5, seed=3)
    assert (controlled.rate, controlled.low, controlled.high) == (plain.rate, plain.low, plain.high)
    assert controlled.coefficient == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.5, 1.0, 0.3, None]), st.integers(0, 900), st.integers(0, 900)
        ),
        min_size=1,
        max_size=40,
    )
)
def test_swapping_the_sides_gives_one_minus_it(
    rows: list[tuple[float | None, int, int]],
) -> None:
    said, ours, theirs = (list(column) for column in zip(*rows, strict=True))
    swapped = [None if o is None else 1 - o for o in said]
    try:
        one = length_controlled(said, ours, theirs, seed=1, resamples=40)
    except (NoOutcomeError, LengthConfoundedError) as error:
        with pytest.raises(type(error)):
            length_controlled(swapped, theirs, ours, seed=1, resamples=40)
        return
    other = length_controlled(swapped, theirs, ours, seed=1, resamples=40)
    assert 0 <= one.low <= one.high <= 1
    assert other.rate == pytest.approx(1 - one.rate, abs=1e-9)
    assert other.low == pytest.approx(1 - one.high, abs=1e-7)
    assert other.high == pytest.approx(1 - one.low, abs=1e-7)
    assert other.coefficient == pytest.approx(one.coefficient, abs=1e-6)


@pytest.mark.parametrize("outcome", [0.0, 1.0])
@pytest.mark.parametrize("n", [2, 20, 5_000])
def test_unanimous_outcomes_stay_finite(outcome: float, n: int) -> None:
    ours = list(range(n))
    controlled = length_controlled([outcome] * n, ours, ours[::-1], seed=0, resamples=100)
    assert np.isfinite([controlled.rate, controlled.coefficient]).all()
    expected = (n * outcome + 0.5) / (n + 1)
    assert controlled.rate == pytest.approx(expected, abs=0.5 / n)
    assert controlled.low <= controlled.rate <= controlled.high


@pytest.mark.parametrize("n", [3, 300, 30_000])
@pytest.mark.parametrize("sign", [1, -1])
def test_outcomes_that_length_alone_decides_stay_finite(n: int, sign: int) -> None:
    ours, theirs = lengths(n, longer_by=0, seed=n)
    ours[0], theirs[0] = theirs[0] + 1, ours[0]
    said = [float(sign * a > sign * b) + (a == b) / 2 for a, b in zip(ours, theirs, strict=True)]
    controlled = length_controlled(said, ours, theirs, seed=0, resamples=50)
    assert 0.2 < controlled.rate < 0.8
    assert 0.5 < sign * controlled.coefficient < 1_000


def test_the_fit_is_the_maximum_of_the_penalised_likelihood() -> None:
    """Against a general optimiser, on soft labels written as two weighted rows each."""
    at = lengths(60, longer_by=80)
    shares = np.random.default_rng(5).random(60)
    difference = np.subtract(*at)
    x = np.tanh(difference / difference.std(ddof=1))

    def loss(b: np.ndarray) -> float:
        logits = b[0] + b[1] * x
        fit = shares @ log_expit(logits) + (1 - shares) @ log_expit(-logits)
        return -float(fit + (log_expit(b) + log_expit(-b)).sum() / 2)

    best = minimize(loss, np.zeros(2), tol=1e-12).x
    found = length_controlled(shares.tolist(), *at, seed=0, resamples=10)
    assert (found.rate, found.coefficient) == pytest.approx((expit(best[0]), best[1]), abs=1e-5)


def test_the_interval_covers_the_truth() -> None:
    """95 % nominal; 300 simulations have a standard error of 1.3 points."""
    quality, hits = 0.6, 0
    for seed in range(300):
        at = lengths(150, longer_by=60, seed=seed)
        rng = np.random.default_rng(1_000 + seed)
        difference = np.subtract(*at)
        chance = expit(quality + 1.2 * np.tanh(difference / difference.std(ddof=1)))
        said = (rng.random(150) < chance).astype(float).tolist()
        found = length_controlled(said, *at, seed=seed, resamples=200)
        hits += found.low <= expit(quality) <= found.high
    assert 0.91 <= hits / 300 <= 0.985


@pytest.mark.parametrize("sign", [1, -1])
def test_where_one_side_is_always_longer_nothing_can_be_said(sign: int) -> None:
    ours, theirs = [100 + sign * 5, 100 + sign * 9, 100 + sign], [100, 100, 100]
    with pytest.raises(LengthConfoundedError, match="longer" if sign > 0 else "shorter"):
        length_controlled([1, 0, 1], ours, theirs, seed=0)
    length_controlled([1, 0, 1], [*ours[:2], 100], theirs, seed=0)


def test_what_was_not_judged_has_no_part() -> None:
    at = lengths(100, longer_by=50)
    said = outcomes(at, 0.5, 1)
    with_failures = [*said, None, None]
    more = [*at[0], 10_000, 3], [*at[1], 2, 90_000]
    assert length_controlled(with_failures, *more, seed=2) == length_controlled(said, *at, seed=2)
    with pytest.raises(NoOutcomeError):
        length_controlled([None], [1], [2], seed=0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        length_controlled([1.5, 0], [1, 3], [2, 2], seed=0)
    with pytest.raises(ValueError, match="argument"):
        length_controlled([1, 0], [1], [2, 2], seed=0)


def test_ten_thousand_resamples_take_seconds() -> None:
    at = lengths(250, longer_by=50)
    started = time.process_time()
    length_controlled(outcomes(at, 0.5, 1), *at, seed=0, resamples=10_000)
    assert time.process_time() - started < 20


def compared(said: Sequence[float | None], at: Lengths, **more: object) -> list[Comparison]:
    values: dict[str, Any] = {
        "iteration": 2, "answer": "refined", "against": 0, "reference": "refined", "judge": "j",
        "our_score": None, "their_score": None, **more,
    }  # fmt: skip
    return [
        Comparison(
            prompt_id=str(i),
            ours="x" * a,
            theirs="y" * b,
            outcome=o,
            failure=None if o is not None else "why",
            **values,
        )
        for i, (o, a, b) in enumerate(zip(said, *at, strict=True))
    ]


def test_every_kind_of_comparison_has_its_figures() -> None:
    at = lengths(80, longer_by=100)
    liked = outcomes(at, 0, 3)
    rows = [
        *compared(liked, at),
        *compared([1.0] * 80, ([9] * 80, [9] * 80), reference="initial"),
        *compared([1.0] * 80, ([9] * 80, [8] * 80), answer="initial", reference="initial"),
        *compared([None] * 80, at, against=OUTSIDE, reference="other"),
    ]
    figures = length_metrics(rows, seed=4, resamples=200)
    found = length_controlled(liked, *at, seed=4, resamples=200)
    name = "win_rate/refined_vs_0_length_controlled"
    assert (figures[name], figures[f"{name}_low"], figures[f"{name}_high"]) == (
        found.rate, found.low, found.high,
    )  # fmt: skip
    assert figures[name] < win_rates(rows[:80], seed=0)["refined_vs_0"].rate - 0.1
    assert figures["win_rate/refined_vs_initial_0_length_controlled"] == 1
    assert len(figures) == 6, "none where one side is always longer, or all judgements failed"
