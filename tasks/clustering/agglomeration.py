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


EXACT_ROWS = 8_192
"""Up to so many rows are linked one by one, more through micro-clusters."""
CELL_ROWS = 4_096
"""Rows at most among which micro-clusters are sought together."""


@pinned()
def group(features: Features, threshold: float, at_most: int | None = None) -> np.ndarray:
    """Cluster numbers (n,), 0 … k-1 in order of first appearance.

    Average linkage on cosine distance up to `threshold`, and beyond it while more than `at_most`
    clusters are left. Rows without a vector stay alone, and do not count. Above `EXACT_ROWS` the
    linkage is that of `micro_clusters`, each as heavy as it has rows.
    """
    (placed,) = np.nonzero(features.present)
    vectors = features.vectors[placed]
    limit = math.inf if at_most else threshold
    micro = micro_clusters(vectors, limit)
    means, sizes = means_of(vectors, micro)
    merges = sorted(agglomerate(means, limit, sizes), key=lambda m: m.distance)
    surplus = len(means) - at_most if at_most else 0
    done = sum(m.distance <= threshold for m in merges)
    numbers = _united(len(means), merges[: max(done, surplus)])[micro]
    alone = numbers.max(initial=-1) + 1 + np.arange(len(features.present))
    alone[placed] = numbers
    return _by_first(alone)


def micro_clusters(vectors: np.ndarray, threshold: float = math.inf) -> np.ndarray:
    """Numbers (n,) of the micro-clusters that rows are linked through; up to `EXACT_ROWS`, of rows.

    Average linkage within cells of near rows. Of all cells' merges the nearest come first, until
    `EXACT_ROWS` micro-clusters are left or no two of a cell lie within `threshold`.
    """
    surplus = max(len(vectors) - EXACT_ROWS, 0)
    merges = [
        Merge(left=int(rows[m.left]), right=int(rows[m.right]), distance=m.distance)
        for rows in (_cells(vectors) if surplus else ())
        for m in agglomerate(vectors[rows], threshold)
    ]
    return _united(len(vectors), sorted(merges, key=lambda m: m.distance)[:surplus])


def agglomerate(
    vectors: np.ndarray,
    threshold: float = math.inf,
    sizes: np.ndarray | None = None,
    block: int = 512,
) -> list[Merge]:
    """Exact average linkage on cosine distance, in O(n·d) memory.

    For unit vectors the mean pairwise cosine of two clusters is the dot product of their means, so
    no n-by-n matrix is kept. Average linkage is reducible (a merge brings no cluster nearer to a
    third than the nearer of its parts was), hence all pairs of reciprocal nearest neighbours can
    merge at once, a nearest neighbour that was not merged stays nearest, and a cluster whose
    nearest lies beyond the threshold is final.

    Args:
        vectors: (n, d) unit rows, or means of unit rows.
        threshold: the largest distance, in [0, 2], at which clusters still merge.
        sizes: (n,) of how many rows each is the mean; None: of one.
        block: rows whose distances to all others are computed together.

    Returns:
        At most n - 1 merges, parts before wholes.
    """
    means = np.array(vectors, dtype=np.float32)
    weights = np.ones(len(means)) if sizes is None else sizes
    weights = np.array(weights, dtype=np.float32)[:, None]
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
        total = weights[left] + weights[right]
        means[left] = (weights[left] * means[left] + weights[right] * means[right]) / total
        weights[left] = total
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


def cut(count: int, merges: Sequence[Merge], threshold: float) -> np.ndarray:
    """Cluster numbers (count,) of so many items after the merges up to a threshold."""
    return _united(count, [merge for merge in merges if merge.distance <= threshold])


def _cells(vectors: np.ndarray) -> list[np.ndarray]:
    """All rows in cells of at most `CELL_ROWS`: halved across their widest direction until then."""
    cells, large = [], [np.arange(len(vectors))]
    while large:
        rows = large.pop()
        if len(rows) <= CELL_ROWS:
            cells.append(rows)
            continue
        sample = vectors[rows[:: len(rows) // CELL_ROWS]]
        ordered = rows[np.argsort(vectors[rows] @ _widest(sample), kind="stable")]
        large += np.array_split(ordered, 2)
    return cells


def _widest(vectors: np.ndarray, rounds: int = 16) -> np.ndarray:
    """The direction (d,) in which the rows differ most, nearly: a few power iterations."""
    offsets = vectors - vectors.mean(axis=0)
    direction: np.ndarray = offsets[np.argmax(np.linalg.norm(offsets, axis=1))]
    for _ in range(rounds):
        direction = (offsets @ direction) @ offsets
        direction /= np.linalg.norm(direction) or 1
    return direction


def means_of(vectors: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean (k, d) and the number of rows (k,) of each group."""
    if not len(vectors):
        return vectors, np.zeros(0)
    order, sizes = np.argsort(groups, kind="stable"), np.bincount(groups)
    sums = np.add.reduceat(vectors[order], np.cumsum(sizes) - sizes)
    return sums / sizes[:, None].astype(np.float32), sizes


def _united(count: int, merges: Sequence[Merge]) -> np.ndarray:
    """Numbers (count,) of what the merges make of so many items, in order of first appearance."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    ends = [m.left for m in merges], [m.right for m in merges]
    graph = coo_matrix((np.ones(len(merges), dtype=np.int8), ends), shape=(count, count))
    return _by_first(connected_components(graph, directed=False)[1])


def _by_first(groups: np.ndarray) -> np.ndarray:
    """The same groups, numbered in order of first appearance."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


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
