"""`python -m benchmarks.champion`: how often the champion rule accepts, on simulated experiments.

Each experiment is decided by the functions that a run uses (`tasks/judging/champion.py`); only the
outcomes of the judge are drawn. It takes seconds and writes benchmarks/champion.md.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from models.files import text_sha256
from tasks.judging.champion import ChampionDecision, decide, draw

PAGE = Path(__file__).with_suffix(".md")
EXPERIMENTS = 500
EFFECT = 0.1
HEAD = """# The champion rule on simulated experiments

`python -m benchmarks.champion` ({experiments:,} experiments a line, seed 0)

Decided by `tasks/judging/champion.py`. Four iterations. The first one's win rate against the
initial policy is given; each later policy is as good as the champion that it meets. "First" is the
share of experiments in which iteration 1 became the champion, "any" that in which some iteration
did. Ties take no side.

"Trained again" is a user who trains every iteration again, five times, until it is accepted: the
held-out prompts are used up, and what comes after accepts nothing.

| held out | a decision | first iteration's win rate | ties | trained again | first | any |
|--:|--:|--:|--:|--:|--:|--:|
"""


def experiment(
    seed: int, held_out: int, rates: Sequence[float], ties: float = 0.0, decisions: int = 4
) -> list[ChampionDecision]:
    """The decisions of one experiment.

    Args:
        rates: the win rate, in [0, 1], of each policy against the champion that it meets.
        ties: the share of ties, in [0, 1], for each of them.
        decisions: among how many the held-out prompts are shared.
    """
    rng = random.Random(seed)
    ids = _ids(held_out)
    done: list[ChampionDecision] = []
    for number, rate in enumerate(rates, start=1):
        champion = max((t for t, before in enumerate(done, start=1) if before.accepted), default=0)
        policies = f"{number}:{champion}"
        drawn = draw(ids, done, decisions, policies)
        outcomes = {i: _outcome(rng, rate, ties) for i in drawn.ids}
        done.append(decide(outcomes, drawn, champion=champion, policies=policies))
    return done


@cache
def _ids(held_out: int) -> tuple[str, ...]:
    return tuple(text_sha256(f"prompt {number}") for number in range(held_out))


def _outcome(rng: random.Random, rate: float, ties: float) -> float:
    win, drawn = rate - ties / 2, rng.random()
    return 1.0 if drawn < win else 0.5 if drawn < win + ties else 0.0


def accepted(
    experiments: int, held_out: int, rates: Sequence[float], ties: float = 0.0
) -> tuple[float, float]:
    """The shares of experiments that accept the first policy, and any."""
    found = [experiment(seed, held_out, rates, ties) for seed in range(experiments)]
    first = sum(decisions[0].accepted for decisions in found)
    some = sum(any(d.accepted for d in decisions) for decisions in found)
    return first / experiments, some / experiments


def main() -> None:
    """Write the table."""
    lines = [HEAD.format(experiments=EXPERIMENTS)]
    for held_out in (1_000, 1_400):
        for gain, ties, again in (
            (0, 0, 1), (0, 0.4, 1), (0, 0, 5), (EFFECT, 0, 1), (EFFECT, 0.4, 1)
        ):  # fmt: skip
            rates = [0.5 + gain, *[0.5] * (4 * again - 1)]
            first, some = accepted(EXPERIMENTS, held_out, rates, ties)
            lines.append(
                f"| {held_out:,} | {held_out // 4} | {0.5 + gain:.2f} | {ties:.0%} | "
                f"{'yes' if again > 1 else 'no'} | {first:.1%} | {some:.1%} |\n"
            )
    PAGE.write_text("".join(lines), "utf-8")
    print("".join(lines))


if __name__ == "__main__":
    main()
