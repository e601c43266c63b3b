"""The gate: what it costs and gives to keep first answers, by the probability that keeps them.

One set of answers tells all of it: a prompt has its first answer, its refined one and p(keep), and
both answers are compared with iteration 0's first one already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from tasks.judging.winrate import win_rate
from tasks.rows import Answer, Comparison

WORTH = 0.95
"""Share of the win rate without a threshold that the chosen one keeps at least."""
STEPS = 10
"""The curve has a point for each tenth of the prompts that is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatePoint:
    """What a threshold gives on the held-out prompts."""

    threshold: float
    """Where p(keep | x, y1) is at least this, the first answer is given."""
    kept: float
    """Share of the prompts that get their first answer."""
    tokens: float
    """Sampled tokens a prompt: of y1 alone where the threshold keeps it."""
    win_rate: float
    """Against iteration 0's first answers, in [0, 1]; with its 95 % interval."""
    low: float
    high: float


def gate_curve(
    answers: Sequence[Answer], comparisons: Sequence[Comparison], *, seed: int, resamples: int
) -> list[GatePoint]:
    """From the threshold that keeps nothing, but what the policy keeps by itself, to the one that
    keeps all; nothing where the policy has no gate, or a judgement failed for every prompt.

    Args:
        comparisons: those with iteration 0's first answers, among others.
    """
    outcomes = {
        (row.prompt_id, row.answer): row.outcome
        for row in comparisons
        if row.against == 0 and row.reference == "initial" and row.outcome is not None
    }
    each = [
        (answer.keep, answer, first, refined)
        for answer in answers
        if answer.keep is not None
        and (first := outcomes.get((answer.prompt_id, "initial"))) is not None
        and (refined := outcomes.get((answer.prompt_id, "refined"))) is not None
    ]
    if not each:
        return []
    ranked = sorted((keep for keep, *_ in each), reverse=True)
    places = [round(step * len(ranked) / STEPS) - 1 for step in range(1, STEPS + 1)]
    found = []
    for threshold in sorted({1.0, *(ranked[max(0, i)] for i in places)}, reverse=True):
        kept = [keep >= threshold for keep, *_ in each]
        rows = list(zip(kept, each, strict=True))
        won = win_rate(
            [first if k else refined for k, (_, _, first, refined) in rows],
            seed=seed,
            resamples=resamples,
        )
        found.append(
            GatePoint(
                threshold=threshold,
                kept=fmean(k or answer.refined == answer.initial for k, (_, answer, *_) in rows),
                tokens=fmean(a.initial_tokens if k else a.tokens for k, (_, a, *_) in rows),
                win_rate=won.rate,
                low=won.low,
                high=won.high,
            )
        )
    return found


def gate_metrics(curve: Sequence[GatePoint]) -> dict[str, float]:
    """The cheapest point that has `WORTH` of the win rate of the first, flat; none without a curve.

    It is chosen on the prompts that it is measured on, so that its win rate is a little too good.
    """
    if not curve:
        return {}
    good = [point for point in curve if point.win_rate >= WORTH * curve[0].win_rate]
    chosen = min(good, key=lambda point: point.tokens)
    return {
        "gate/threshold": chosen.threshold,
        "gate/kept": chosen.kept,
        "gate/tokens": chosen.tokens,
        "gate/win_rate": chosen.win_rate,
        "gate/win_rate_low": chosen.low,
        "gate/win_rate_high": chosen.high,
    }
