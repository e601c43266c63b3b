"""The distance threshold whose clusters predict best what refinements insert.

A label has to keep the likelihood of the refinements that it is given to. Half of the words
describe the principles, and clusters have to predict the other half of the words that each
principle's refinements insert, from those of the cluster's other members; then the halves change
places. The figure is in nats a word, whatever the kind of features: the rule needs no scale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from models.engine.threads import pinned
from tasks.clustering.agglomeration import agglomerate, cut
from tasks.clustering.features import Features
from tasks.clustering.insertions import Insertions

Describe = Callable[[np.ndarray, Any], Features]
"""The features of some rows, by their numbers (n,), where they inserted these words alone: counts
(n, words)."""

ROWS = 4_000
"""Principles at most that the rule reads, a sample. A mean distance does not depend on how many
rows it is the mean of, so the sample's threshold holds for all."""
CANDIDATES = 40
CONCENTRATIONS = (1.0, 10.0, 100.0, 1000.0)
"""How many words of all principles together are mixed into a cluster's own. Each threshold takes
the best."""


@pinned()
def predictive_threshold(describe: Describe, inserted: Insertions, seed: int = 0) -> float | None:
    """The largest threshold that predicts as well as the best one, within one standard error.

    Among equal ones the largest gives the shortest constitution.

    Args:
        inserted: what the refinements of each principle insert.
        seed: of the sample.

    Returns:
        In (0, 2]; None where fewer than 8 principles have features, or no words to predict.
    """
    principles = inserted.counts.shape[0]
    rows = np.sort(np.random.default_rng(seed).permutation(principles)[:ROWS])
    counts = inserted.counts[rows]
    whole = describe(rows, counts)
    if whole.present.sum() < 8:
        return None
    thresholds = _candidates(whole.vectors[whole.present])
    odd = np.array([_is_odd(word) for word in inserted.words], dtype=bool)
    folds = []
    for described in (odd, ~odd):
        features, hidden = describe(rows, _only(counts, described)), _only(counts, ~described)
        there = features.present & (hidden.getnnz(axis=1) > 0)
        if there.sum() < 8:
            return None
        vectors, hidden = features.vectors[there], hidden[there]
        tree = agglomerate(vectors)
        folds.append([_likelihood(hidden, cut(len(vectors), tree, t)) for t in thresholds])
    each = np.hstack([np.array(fold) for fold in folds])  # (thresholds, principles of both folds)
    best = int(each.mean(axis=1).argmax())
    loss = each[best] - each
    error = loss.std(axis=1, ddof=1) / np.sqrt(each.shape[1])
    return float(thresholds[np.flatnonzero(loss.mean(axis=1) <= error)[-1]])


def _likelihood(counts: Any, groups: np.ndarray) -> np.ndarray:
    """Mean log-probability of a word of each principle, in nats, by the group's other members.

    Args:
        counts: (principles, words), no row of them empty.
        groups: (principles,) cluster numbers.
    """
    cells = counts.tocoo()
    data = cells.data.astype(np.float64)
    shared = groups[cells.row] * cells.shape[1] + cells.col
    _, place = np.unique(shared, return_inverse=True)
    others = np.bincount(place, data)[place] - data
    own = np.bincount(cells.row, data)
    rest = (np.bincount(groups, own)[groups] - own)[cells.row]
    common = np.bincount(cells.col, data, minlength=cells.shape[1]) / own.sum()
    tried = [
        np.bincount(cells.row, data * np.log((others + a * common[cells.col]) / (rest + a))) / own
        for a in CONCENTRATIONS
    ]
    return max(tried, key=lambda each: float(each.mean()))


def _only(counts: Any, words: np.ndarray) -> Any:
    """The counts of these words alone, a mask (words,); the shape stays."""
    found = counts.multiply(words).tocsr()
    found.eliminate_zeros()
    return found


def _is_odd(word: str) -> bool:
    return bool(hashlib.sha256(word.encode()).digest()[0] % 2)


def _candidates(vectors: np.ndarray) -> np.ndarray:
    """Thresholds, ascending, between the merges of the rows that leave 2, 3, … n/2 clusters."""
    heights = np.sort([merge.distance for merge in agglomerate(vectors)])
    clusters = np.unique(np.geomspace(2, max(len(vectors) // 2, 2), CANDIDATES).astype(int))
    done = len(vectors) - clusters
    between = (heights[done - 1] + heights[np.minimum(done, len(heights) - 1)]) / 2
    return np.unique(np.clip(between, 1e-6, 2))
