"""The map of principles: a place in the plane for each, drawn as a picture."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.engine.threads import pinned
from tasks.clustering.features import Features
from tasks.rows import ClusterRow

PLACED = 4_000
"""Principles at most that get a place on the map: more dots nobody tells apart."""


def map_principles(features: Features, how: str = "umap", seed: int = 0) -> np.ndarray:
    """Places in the plane for a picture: (n, 2), NaN for rows without a vector.

    UMAP (cosine) where asked for and where there are enough rows for it, else the two leading
    singular directions; "none": NaN everywhere. Of more than `PLACED` rows a sample gets a place.
    """
    places = np.full((len(features.present), 2), np.nan)
    (rows,) = np.nonzero(features.present)
    if len(rows) > PLACED:
        rows = np.sort(np.random.default_rng(seed).choice(rows, PLACED, replace=False))
    if how != "none" and len(rows):
        draw = _umap if how == "umap" and len(rows) >= 5 else _leading_directions
        places[rows] = draw(features.vectors[rows], seed)
    return places


def figure(rows: Sequence[ClusterRow], path: str | Path, size: int, labels: int = 20) -> None:
    """Draw the map as a PNG: a dot a principle, a colour a cluster, the largest clusters named.

    Args:
        size: principles of the constitution; those of clusters beyond it, the tail, are grey.
        labels: most clusters that are named.
    """
    from matplotlib.figure import Figure

    placed = [row for row in rows if row.x is not None]
    x, y = _points(placed).T
    canvas = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    axes = canvas.add_subplot()
    axes.scatter(
        x,
        y,
        s=[12 + 8 * math.sqrt(row.support) for row in placed],
        c=[_colour(row, size) for row in placed],
        alpha=0.7,
        linewidths=0,
    )
    for number in range(min(labels, size)):
        _name_cluster(axes, [row for row in placed if row.cluster == number])
    clusters = len({row.cluster for row in rows if row.cluster < size})
    of = f" of {len(rows):,}" if len(placed) < len(rows) else ""
    tail = " and a tail (grey)" if any(row.cluster >= size for row in rows) else ""
    axes.set_title(f"{len(placed):,}{of} principles in {clusters:,} clusters{tail}")
    axes.set_axis_off()
    canvas.savefig(path)


def _umap(vectors: np.ndarray, seed: int) -> np.ndarray:
    """UMAP by cosine distances from BLAS: UMAP computes those of few rows one by one, in Python."""
    from sklearn.metrics.pairwise import cosine_distances
    from umap import UMAP

    neighbours = min(15, len(vectors) - 1)
    mapper = UMAP(n_neighbors=neighbours, metric="precomputed", random_state=seed, n_jobs=1)
    with pinned(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "using precomputed metric")
        return np.asarray(mapper.fit_transform(cosine_distances(vectors)))


@pinned()
def _leading_directions(vectors: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.decomposition import TruncatedSVD

    if min(vectors.shape) <= 2:
        return np.pad(vectors, ((0, 0), (0, 2)))[:, :2]
    return np.asarray(TruncatedSVD(2, random_state=seed).fit_transform(vectors - vectors.mean(0)))


def _name_cluster(axes: Any, rows: Sequence[ClusterRow]) -> None:
    if not rows:
        return
    x, y = np.median(_points(rows), axis=0)
    text = rows[0].representative
    short = text if len(text) <= 48 else text[:47] + "…"
    box = {"fc": "white", "alpha": 0.7, "lw": 0}
    above = {"xytext": (0, 9), "textcoords": "offset points"}
    axes.annotate(short, (x, y), ha="center", fontsize=8, bbox=box, **above)


def _colour(row: ClusterRow, size: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"](row.cluster % 20) if row.cluster < size else (0.6, 0.6, 0.6, 1.0)


def _points(rows: Sequence[ClusterRow]) -> np.ndarray:
    return np.array([(row.x, row.y) for row in rows], dtype=float).reshape(-1, 2)
