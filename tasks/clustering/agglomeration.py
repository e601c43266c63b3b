"""Average linkage on cosine distance, and each cluster's representative."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.engine.threads import pinned
from tasks.clustering.features import Distinct, Features


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """The clusters that hold items `left` and `right` become one, at this mean cosine distance."""

    left: int
    right: int
    distance: float


@pinned()
def group(features: Features, threshold: float, at_most: int | None = None) -> np.ndarray:
    """Cluster numbers (n,), 0 … k-1 in order of first appearance.

    Average linkage on cosine distance up to `threshold`, and beyond it while more than `at_most`
    clusters are left. Rows without a vector stay alone, and do not count.
    """
    (placed,) = np.nonzero(features.present)
    limit = math.inf if at_most else threshold
    merges = sorted(agglomerate(features.vectors[placed], limit), key=lambda m: m.distance)
    surplus = len(placed) - at_most if at_most else 0
    parents = np.arange(len(features.present))
    for done, merge in enumerate(merges):
        if merge.distance > threshold and done >= surplus:
            break
        left, right = _root(parents, placed[merge.left]), _root(parents, placed[merge.right])
        parents[max(left, right)] = min(left, right)
    roots = [_root(parents, item) for item in range(len(parents))]
    return np.unique(roots, return_inverse=True)[1]


def agglomerate(vectors: np.ndarray, threshold: float = math.inf, block: int = 512) -> list[Merge]:
    """Exact average linkage on cosine distance, in O(n·d) memory.

    For unit vectors the mean pairwise cosine of two clusters is the dot product of their means, so
    no n-by-n matrix is kept. Average linkage is reducible (a merge brings no cluster nearer to a
    third than the nearer of its parts was), hence all pairs of reciprocal nearest neighbours can
    merge at once, a nearest neighbour that was not merged stays nearest, and a cluster whose
    nearest lies beyond the threshold is final.

    Args:
        vectors: (n, d) unit rows.
        threshold: the largest distance, in [0, 2], at which clusters still merge.
        block: rows whose distances to all others are computed together.

    Returns:
        At most n - 1 merges, parts before wholes.
    """
    means = np.array(vectors, dtype=np.float32)
    sizes = np.ones((len(means), 1), dtype=np.float32)
    nearest = np.zeros(len(means), dtype=np.intp)
    similarity = np.zeros(len(means), dtype=np.float32)
    alive = np.ones(len(means), dtype=bool)
    active = stale = np.arange(len(means))
    merges: list[Merge] = []
    while len(active) > 1:
        _find_nearest(means, active, stale, nearest, similarity, block)
        alive[active[1 - similarity[active] > threshold]] = False
        left, right = _reciprocal(np.flatnonzero(alive), nearest, similarity)
        merges += _as_merges(left, right, similarity)
        total = sizes[left] + sizes[right]
        means[left] = (sizes[left] * means[left] + sizes[right] * means[right]) / total
        sizes[left] = total
        alive[right] = False
        changed = ~alive
        changed[left] = True
        active = np.flatnonzero(alive)
        stale = active[changed[active] | changed[nearest[active]]]
    return merges


@pinned()
def representatives(
    distinct: Sequence[Distinct], groups: np.ndarray, features: Features | None, how: str
) -> list[int]:
    """The index of each group's representative among `distinct`, by group number.

    "medoid": the member with the smallest summed distance to the others, each counted as often as
    it was kept; "mode": the member that was kept most often. Ties go to the first by key.
    """
    support = np.array([d.support for d in distinct], dtype=np.float32)
    chosen = []
    for members in members_of(groups):
        central = support[members]
        if how == "medoid" and features is not None:
            vectors = features.vectors[members]
            central = vectors @ (central @ vectors)
        chosen.append(int(members[np.argmax(central)]))
    return chosen


def members_of(groups: np.ndarray) -> list[np.ndarray]:
    """The items of each group, in order; the groups are numbered without a gap."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.cumsum(np.bincount(groups))[:-1]) if len(groups) else []


def _root(parents: np.ndarray, item: int) -> int:
    while parents[item] != item:
        parents[item] = parents[parents[item]]
        item = parents[item]
    return int(item)


def _find_nearest(
    means: np.ndarray,
    active: np.ndarray,
    stale: np.ndarray,
    nearest: np.ndarray,
    similarity: np.ndarray,
    block: int,
) -> None:
    """Fill in the nearest other active cluster, and its similarity, of each stale one."""
    others = means[active].T
    for start in range(0, len(stale), block):
        rows = stale[start : start + block]
        cosines = means[rows] @ others
        cosines[np.arange(len(rows)), np.searchsorted(active, rows)] = -np.inf
        similarity[rows] = cosines.max(axis=1)
        equal = cosines == similarity[rows, None]
        nearest[rows] = active[equal.argmax(axis=1)]
        for i in np.flatnonzero(np.count_nonzero(equal, axis=1) > 1):
            nearest[rows[i]] = _preferred(rows[i], active[equal[i]])


def _preferred(row: int, tied: np.ndarray) -> int:
    """The tied neighbour that shares most leading bits with the row's number.

    The preference is mutual: equal distances pair off, where "the first" would have all clusters
    wait for one.
    """
    return int(tied[np.argmin(tied ^ row)])


def _reciprocal(
    active: np.ndarray, nearest: np.ndarray, similarity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of active clusters that are each other's nearest.

    Rounding may leave a ring of equal distances without such a pair: then the nearest pair.
    """
    partner = nearest[active]
    left = active[(nearest[partner] == active) & (active < partner)]
    if len(left) or not len(active):
        return left, nearest[left]
    best = active[[similarity[active].argmax()]]
    return np.minimum(best, nearest[best]), np.maximum(best, nearest[best])


def _as_merges(left: np.ndarray, right: np.ndarray, similarity: np.ndarray) -> list[Merge]:
    distances = 1 - np.maximum(similarity[left], similarity[right])
    return [
        Merge(left=int(a), right=int(b), distance=float(d))
        for a, b, d in zip(left, right, distances, strict=True)
    ]
