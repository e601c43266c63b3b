"""The champion rule: how often it accepts, which prompts a decision takes, what is recorded."""

from __future__ import annotations

import pytest

from benchmarks.champion import experiment
from models.files import text_sha256
from tasks.judging.champion import ERROR_RATE, ChampionDecision, decide, draw, sign_test

IDS = [text_sha256(str(number)) for number in range(120)]
EXPERIMENTS = 200
HELD_OUT = 1_400
"""What docs/method.md names for four decisions."""


def decision(
    number: int, used: list[ChampionDecision], won: float = 0.5, decisions: int = 4
) -> ChampionDecision:
    drawn = draw(IDS, used, decisions, f"policy {number}")
    outcomes = dict.fromkeys(IDS, won)
    return decide(outcomes, drawn, champion=0, policies=f"policy {number}")


def accepts(rates: list[float], ties: float = 0.0) -> float:
    """The share of experiments in which any policy becomes the champion."""
    found = [experiment(seed, HELD_OUT, rates, ties) for seed in range(EXPERIMENTS)]
    return sum(any(d.accepted for d in decisions) for decisions in found) / EXPERIMENTS


def test_without_an_effect_at_most_five_per_cent_accept() -> None:
    assert accepts([0.5] * 4) <= 0.05
    assert accepts([0.5] * 8, ties=0.4) <= 0.05, "however often a policy is trained again"


def test_with_ten_points_at_least_eighty_per_cent_accept() -> None:
    assert accepts([0.6, 0.5, 0.5, 0.5]) >= 0.8
    assert accepts([0.5, 0.5, 0.5, 0.6]) >= 0.8, "the last decision is as strong as the first"


def test_no_decision_uses_the_prompts_of_another() -> None:
    done: list[ChampionDecision] = []
    taken: list[str] = []
    for number in range(5):
        drawn = draw(IDS, done, 4, f"policy {number}")
        taken += drawn.ids
        done.append(decision(number, done, won=1.0))
    assert len(taken) == len(set(taken)) == len(IDS)
    assert sum(d.level for d in done) == pytest.approx(ERROR_RATE)
    assert [d.wins for d in done] == [30, 30, 30, 30, 0]
    assert [d.accepted for d in done] == [True, True, True, True, False], "none are left"
    assert sum(d.level for d in [*done[:2], decision(9, done[:2], decisions=1)]) <= ERROR_RATE


def test_the_same_two_policies_meet_on_the_same_prompts() -> None:
    first = decision(1, [])
    second = decision(2, [first])
    again = draw(IDS, [first, second], 4, "policy 1")
    assert again == draw(IDS, [], 4, "policy 1")
    assert again.ids.isdisjoint(draw(IDS, [first], 4, "policy 2").ids)


def test_failures_and_ties_take_no_side() -> None:
    drawn = draw(IDS, [], 1, "policies")
    outcomes: dict[str, float | None] = dict.fromkeys(IDS[:90], 0.5)
    outcomes |= dict.fromkeys(IDS[:12], 1.0) | {IDS[20]: 0.3, IDS[21]: None}
    found = decide(outcomes, drawn, champion=0, policies="policies")
    assert (found.wins, found.losses, found.ties, found.failed) == (12, 1, 76, 31)
    assert found.p_value == pytest.approx(14 / 2**13)  # C(13, 12) + C(13, 13) of 2^13
    assert sign_test(0, 0) == 1.0


def test_what_else_speaks_against_a_policy_rejects_it() -> None:
    drawn = draw(IDS, [], 4, "policies")
    won = dict.fromkeys(IDS, 1.0)
    found = decide(won, drawn, champion=0, policies="policies", against=["it forgets"])
    assert found.p_value <= found.level and not found.accepted
    assert ChampionDecision.read(found.tag) == found
    assert ChampionDecision.read("") is None
