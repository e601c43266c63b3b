"""What became of every principle from one iteration's constitution to the next.

The report shows it as one table: a line a principle, a column an iteration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from constitutions.constitution import Changes, Constitution, Principle, diff, principle_key


class Event(NamedTuple):
    """What happened to a principle on the way to an iteration."""

    iteration: int
    what: str
    """ "added", "reworded", "merged" or "dropped"."""
    into: str = ""
    """The wording of what it was merged into."""


@dataclass
class PrincipleHistory:
    """One principle through the iterations."""

    principles: dict[int, Principle]
    """Iteration → the principle as it stood there."""
    events: list[Event] = field(default_factory=list)

    @property
    def newest(self) -> Principle:
        """The principle as it was last."""
        return self.principles[max(self.principles)]

    @property
    def earlier(self) -> list[tuple[int, str]]:
        """(iteration, wording) of every wording that another one followed."""
        steps = sorted(self.principles.items())
        return [(t, was.text) for (t, was), (_, now) in pairwise(steps) if was.text != now.text]


class ConstitutionChange(NamedTuple):
    """How many principles did what between two iterations; the new constitution is
    kept + added."""

    before: int
    after: int
    kept: int
    reworded: int
    more: int
    """Kept ones with more trajectories than before."""
    fewer: int
    merged: int
    dropped: int
    added: int


def movement(
    constitutions: Mapping[int, Constitution],
) -> tuple[list[PrincipleHistory], list[ConstitutionChange]]:
    """Every principle's history, and how many changed between iterations: see `constitution.diff`.

    The principles of the last iteration come first, by their support there; then the others, the
    latest ended first.
    """
    iterations = sorted(constitutions)
    alive = {
        p.id: PrincipleHistory({t: p}) for t in iterations[:1] for p in constitutions[t].principles
    }
    lines, steps = list(alive.values()), []
    for before, after in pairwise(iterations):
        old, new = constitutions[before], constitutions[after]
        changes = diff(old, new)
        steps.append(_step(before, after, new, changes))
        _end(alive, changes, after)
        alive = _go_on(alive, old, new, changes, after)
        lines += [line for line in alive.values() if set(line.principles) == {after}]
    return sorted(lines, key=_rank), steps


def _rank(line: PrincipleHistory) -> tuple[int, int, str]:
    return -max(line.principles), -line.newest.support, line.newest.text


def _step(before: int, after: int, new: Constitution, changes: Changes) -> ConstitutionChange:
    grown = [now.support > was.support for was, now in changes.support_changed]
    return ConstitutionChange(
        before=before,
        after=after,
        kept=len(new.principles) - len(changes.added),
        reworded=len(changes.reworded),
        more=sum(grown),
        fewer=len(grown) - sum(grown),
        merged=len(changes.merged),
        dropped=len(changes.dropped),
        added=len(changes.added),
    )


def _end(alive: Mapping[str, PrincipleHistory], changes: Changes, after: int) -> None:
    """Note it on the lines that end before an iteration."""
    for part, whole in changes.merged:
        alive[part.id].events.append(Event(after, "merged", whole.text))
    for principle in changes.dropped:
        alive[principle.id].events.append(Event(after, "dropped"))


def _go_on(
    alive: Mapping[str, PrincipleHistory],
    old: Constitution,
    new: Constitution,
    changes: Changes,
    after: int,
) -> dict[str, PrincipleHistory]:
    """The lines of the new constitution, by the ids that its principles have there."""
    same = {principle_key(p.text): p for p in old.principles}
    changed = {now.id: was for was, now in (*changes.reworded, *changes.support_changed)}
    reworded = {now.id for _, now in changes.reworded}
    added = {p.id for p in changes.added}
    found: dict[str, PrincipleHistory] = {}
    for now in new.principles:
        if now.id in added:
            found[now.id] = PrincipleHistory({}, [Event(after, "added")])
        else:
            was = changed.get(now.id) or same[principle_key(now.text)]
            found[now.id] = alive[was.id]
        found[now.id].principles[after] = now
        if now.id in reworded:
            found[now.id].events.append(Event(after, "reworded"))
    return found
