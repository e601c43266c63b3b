"""The champion rule: does an iteration's policy beat the best one so far, beyond chance?

A decision takes its share of the held-out prompts, none of which an earlier decision has used, and
tests the paired outcomes of the two policies' answers at the same share of `ERROR_RATE`. The shares
add up to at most 1: however many policies an experiment decides about, adaptively, the chance that
it ever accepts one that is no better than its champion is at most `ERROR_RATE` (union bound). A
decision about the same two policies that is taken again, after a change of the judge or of how
answers are sampled, takes the same prompts and the same level: the bound does not cover a choice
among such repeats.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

ERROR_RATE = 0.025
"""Share of experiments without any improvement in which an iteration is accepted, at most: as one
side of a 95 % interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChampionDecision:
    """Whether a policy became the champion, and from which evidence."""

    champion: int
    """The iteration of the champion that it is compared with; 0 is the initial policy."""
    policies: str
    """The digests of the two policies."""
    after: str
    last: str
    """The prompts are those whose id is greater than `after`, up to `last`."""
    share: float
    """Their share, in [0, 1], of the held-out prompts."""
    wins: int
    losses: int
    ties: int
    failed: int
    """Prompts without a verdict; they are in no other figure."""
    p_value: float
    """One-sided exact sign test of "the policy wins at most half of what is decided"."""
    level: float
    """What the p-value may be at most: `ERROR_RATE` · `share`."""
    against: tuple[str, ...] = ()
    """What speaks against the policy although it wins."""

    @property
    def accepted(self) -> bool:
        """Whether the policy is the champion now."""
        return self.level > 0 and self.p_value <= self.level and not self.against

    @property
    def metrics(self) -> dict[str, float]:
        """The figures that MLflow charts."""
        judged = {name: getattr(self, name) for name in ("wins", "losses", "ties", "failed")}
        figures = {"accepted": self.accepted, **judged, "p": self.p_value, "level": self.level}
        return {f"champion/{name}": float(value) for name, value in figures.items()}

    @property
    def tag(self) -> str:
        """The decision as the value of a tag."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, tag: str) -> ChampionDecision | None:
        """A decision from its tag; None where there is none."""
        if not tag:
            return None
        found = json.loads(tag)
        return cls(**{**found, "against": tuple(found["against"])})


class Drawn(NamedTuple):
    """The prompts of a decision."""

    ids: frozenset[str]
    after: str
    last: str
    share: float


def draw(
    held_out: Iterable[str], used: Sequence[ChampionDecision], decisions: int, policies: str
) -> Drawn:
    """The prompts that a decision takes: a `decisions`-th of all, of those that none has used.

    Ids are hashes, so that their order is random. A decision about the same two policies, as after
    a change of the judge, takes the prompts that it took before.

    Args:
        held_out: the ids of all held-out prompts.
        used: the decisions of the experiment before this one, also those that count no more.
        decisions: among how many the held-out prompts are shared.
        policies: as `ChampionDecision.policies`.
    """
    ids = sorted(held_out)
    for before in used:
        if before.policies == policies:
            chosen = [i for i in ids if before.after < i <= before.last]
            return Drawn(frozenset(chosen), before.after, before.last, before.share)
    after = max((before.last for before in used), default="")
    chosen = [i for i in ids if i > after][: len(ids) // decisions]
    left = 1 - sum({before.policies: before.share for before in used}.values())
    share = min(len(chosen) / len(ids), max(left, 0.0)) if ids else 0.0
    return Drawn(frozenset(chosen), after, chosen[-1] if chosen else after, share)


def decide(
    outcomes: Mapping[str, float | None],
    drawn: Drawn,
    *,
    champion: int,
    policies: str,
    against: Iterable[str] = (),
) -> ChampionDecision:
    """Decide by the outcomes of a policy's answers against the champion's.

    Args:
        outcomes: prompt id → 1 a win of the policy, ½ a tie, 0 a loss, or any value between; None
            where no judge could say. Only the drawn prompts count; of them, a missing one failed.
        against: what else speaks against the policy.
    """
    found = [outcomes.get(i) for i in sorted(drawn.ids)]
    wins, losses = sides(found)
    failed = sum(outcome is None for outcome in found)
    return ChampionDecision(
        champion=champion,
        policies=policies,
        after=drawn.after,
        last=drawn.last,
        share=drawn.share,
        wins=wins,
        losses=losses,
        ties=len(found) - failed - wins - losses,
        failed=failed,
        p_value=sign_test(wins, losses),
        level=ERROR_RATE * drawn.share,
        against=tuple(against),
    )


def sides(outcomes: Iterable[float | None]) -> tuple[int, int]:
    """How many outcomes favour the policy, and how many the champion."""
    known = [outcome for outcome in outcomes if outcome is not None]
    return sum(o > 0.5 for o in known), sum(o < 0.5 for o in known)


def sign_test(wins: int, losses: int) -> float:
    """Exact one-sided p-value of "a win is at most as likely as a loss"; 1 if nothing is decided.

    Ties take no side.
    """
    from scipy.stats import binom

    return float(binom.sf(wins - 1, wins + losses, 0.5)) if wins + losses else 1.0
