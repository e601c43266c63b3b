"""The distance threshold whose clusters predict best what refinements insert.

A label has to keep the likelihood of the refinements that it is given to. Half of the words
describe the principles, and clusters have to predict the other half of the words that each
principle's refinements insert, from those of the cluster's other members; then the halves change
places. The figure is in nats a word, whatever the kind of features: the rule needs no scale.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.engine.threads import pinned
from tasks.clustering.agglomeration import agglomerate, cut
from tasks.clustering.features import Features, word_counts

Insertions = Sequence[Counter[str]]
Describe = Callable[[np.ndarray, Insertions], Features]
"""The features of some rows, by their numbers (n,), where they inserted these words alone."""

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
    rows = np.sort(np.random.default_rng(seed).permutation(len(inserted))[:ROWS])
    whole = describe(rows, [inserted[row] for row in rows])
    if whole.present.sum() < 8:
        return None
    thresholds = _candidates(whole.vectors[whole.present])
    folds = []
    for described in (False, True):
        shown = [_half(inserted[row], described) for row in rows]
        features = describe(rows, shown)
        hidden = _Words.of([_half(inserted[row], not described) for row in rows])
        there = features.present & hidden.any
        if there.sum() < 8:
            return None
        vectors, hidden = features.vectors[there], hidden.only(there)
        tree = agglomerate(vectors)
        folds.append([hidden.likelihood(cut(len(vectors), tree, t)) for t in thresholds])
    each = np.hstack([np.array(fold) for fold in folds])  # (thresholds, principles of both folds)
    best = int(each.mean(axis=1).argmax())
    loss = each[best] - each
    error = loss.std(axis=1, ddof=1) / np.sqrt(each.shape[1])
    return float(thresholds[np.flatnonzero(loss.mean(axis=1) <= error)[-1]])


@dataclass(frozen=True, slots=True)
class _Words:
    """Words of principles: `counts` is (principles, words)."""

    counts: Any

    @classmethod
    def of(cls, inserted: Insertions) -> _Words:
        return cls(word_counts(inserted).astype(np.float64))

    @property
    def any(self) -> np.ndarray:
        return np.asarray(self.counts.sum(axis=1)).ravel() > 0

    def only(self, rows: np.ndarray) -> _Words:
        return _Words(self.counts[rows])

    def likelihood(self, groups: np.ndarray) -> np.ndarray:
        """Mean log-probability (principles,) of a word, in nats, by the group's other members."""
        cells = self.counts.tocoo()
        shared = groups[cells.row] * cells.shape[1] + cells.col
        _, place = np.unique(shared, return_inverse=True)
        others = np.bincount(place, cells.data)[place] - cells.data
        own = np.bincount(cells.row, cells.data)
        rest = (np.bincount(groups, own)[groups] - own)[cells.row]
        common = np.bincount(cells.col, cells.data, minlength=cells.shape[1]) / own.sum()
        tried = [
            np.bincount(
                cells.row, cells.data * np.log((others + a * common[cells.col]) / (rest + a))
            )
            / own
            for a in CONCENTRATIONS
        ]
        return max(tried, key=lambda each: float(each.mean()))


def _half(inserted: Counter[str], second: bool) -> Counter[str]:
    """The words whose hash is even, or odd."""
    return Counter({w: n for w, n in inserted.items() if _is_odd(w) == second})


@functools.lru_cache(maxsize=1 << 20)
def _is_odd(word: str) -> bool:
    return bool(hashlib.sha256(word.encode()).digest()[0] % 2)


def _candidates(vectors: np.ndarray) -> np.ndarray:
    """Thresholds, ascending, between the merges of the rows that leave 2, 3, … n/2 clusters."""
    heights = np.sort([merge.distance for merge in agglomerate(vectors)])
    clusters = np.unique(np.geomspace(2, max(len(vectors) // 2, 2), CANDIDATES).astype(int))
    done = len(vectors) - clusters
    between = (heights[done - 1] + heights[np.minimum(done, len(heights) - 1)]) / 2
    return np.unique(np.clip(between, 1e-6, 2))
