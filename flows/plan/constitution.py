"""The size of a constitution and what it covers, before it is there.

Before anything ran only the bounds are known. From the clusters of a recorded iteration two
estimates of ecology follow, where a cluster is a species and a trajectory an individual: how many
clusters more trajectories have (Chao's extrapolation, a lower bound), and what share of them the
largest clusters label (after Good and Turing, what was seen once tells of the unseen only). Both
take more trajectories to be like those that were recorded, and to be clustered alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.cluster import ClusterSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """The constitution of one iteration."""

    trajectories: float
    at_most: float
    """Principles, by the settings; without a bound one for each trajectory."""
    principles: float | None
    """The number that is expected; None: nothing is recorded."""
    coverage: float | None
    """The share of the trajectories that they label, in [0, 1]; None: nothing is recorded."""


def foreseen(
    settings: ClusterSettings, trajectories: float, recorded: Sequence[int] = ()
) -> Foreseen:
    """What the settings and an earlier iteration tell of a constitution.

    Args:
        recorded: the trajectories of each cluster of that iteration, the tail's included.
    """
    bounds = (settings.constitution_size, settings.max_principles)
    at_most = min([trajectories, *(float(bound) for bound in bounds if bound)])
    if not recorded:
        known = None if settings.constitution_size else 1.0
        return Foreseen(trajectories=trajectories, at_most=at_most, principles=None, coverage=known)
    return Foreseen(
        trajectories=trajectories,
        at_most=at_most,
        principles=min(at_most, clusters_of(recorded, trajectories)),
        coverage=covered_by(recorded, settings.constitution_size),
    )


def clusters_of(recorded: Sequence[int], trajectories: float) -> float:
    """The clusters of so many trajectories, at least: Chao's estimate for more than the recorded
    ones; for fewer, at most one each."""
    once, twice, n = recorded.count(1), recorded.count(2), sum(recorded)
    more = trajectories - n
    if more <= 0:
        return min(float(len(recorded)), trajectories)
    unseen = once * (once - 1) / (2 * (twice + 1))
    if not unseen:
        return float(len(recorded))
    return len(recorded) + unseen * (1 - (1 - once / (n * unseen + once)) ** more)


def covered_by(recorded: Sequence[int], size: int | None) -> float:
    """The share of further trajectories, in [0, 1], that the `size` largest clusters label.

    Clusters of one trajectory have no part in it: as often as they occur, a further trajectory is
    of a cluster that has not been seen.
    """
    if size is None:
        return 1.0
    largest = sorted(recorded, reverse=True)[:size]
    return sum(count for count in largest if count > 1) / sum(recorded)
