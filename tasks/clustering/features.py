"""What principles are compared by: their wording (characters, sentences, hidden states) and their
effect (what their refinements insert).

Every block has one row a principle. A row without a vector is marked absent, never a zero that
counts: `combine` takes the other blocks for it and says which rows have no vector at all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from constitutions.constitution import principle_key
from models.engine.threads import pinned
from tasks.rows import Trajectory

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

EXACT_ENTRIES = 1 << 22
"""A block is used as it is up to this many entries, else reduced: linking costs as many products of
rows as there are pairs."""
COMPONENTS = 256
"""Singular vectors that a larger block is reduced to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distinct:
    """All spellings of one principle: the most frequent text, and how often it was kept."""

    key: str
    text: str
    support: int


@dataclass(frozen=True, slots=True)
class Features:
    """`vectors`: (n, d) float32, rows of length one (below one where a block was reduced).

    `present`: (n,) bool, False where no block had anything to say of that row.
    """

    vectors: np.ndarray
    present: np.ndarray

    def only(self, rows: np.ndarray) -> Features:
        """The features of some rows, by their numbers."""
        return Features(self.vectors[rows], self.present[rows])


def distinct_principles(trajectories: Iterable[Trajectory]) -> list[Distinct]:
    """The kept principles without repetition (white space, case and final marks), by key."""
    spellings: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in trajectories:
        spellings[principle_key(row.principle)][" ".join(row.principle.split())] += 1
    return [
        Distinct(key=key, text=min(texts, key=lambda t: (-texts[t], t)), support=texts.total())
        for key, texts in sorted(spellings.items())
    ]


def character_features(texts: Sequence[str]) -> csr_matrix:
    """TF-IDF of the character 3- to 5-grams inside words; (texts, n-grams), unit rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), dtype=np.float32)
    return vectorizer.fit_transform(texts)


def effect_features(counts: csr_matrix) -> csr_matrix:
    """Sublinear TF-IDF of the tokens that each principle's refinements inserted.

    Args:
        counts: (principles, tokens), as `Insertions` has them.

    Returns:
        (principles, tokens that occur) with unit rows; a principle that inserted nothing has an
        empty row, which `combine` takes for absent.
    """
    from sklearn.feature_extraction.text import TfidfTransformer

    counts = counts[:, np.flatnonzero(counts.getnnz(axis=0))] if counts.nnz else counts
    return TfidfTransformer(sublinear_tf=True).fit_transform(counts) if counts.nnz else counts


def centred(vectors: np.ndarray) -> np.ndarray:
    """Vectors less their mean: hidden states share one large direction."""
    offsets: np.ndarray = vectors - vectors.mean(axis=0)
    return offsets


@pinned()
def block_features(block: Any, seed: int = 0) -> Features:
    """A block of features, (n, d) array or sparse matrix, with rows of length one.

    More than `EXACT_ENTRIES` are reduced to `COMPONENTS` columns that keep the dot products, by a
    randomised SVD. An all-zero row is absent.
    """
    from sklearn.preprocessing import normalize

    present = _row_norms(block) > 0
    return Features(_dense(normalize(block), seed), present)


def combine(blocks: Sequence[Features]) -> Features:
    """Blocks of features side by side, each of the same weight.

    The cosine of two combined rows is the mean of their blocks' cosines. A row that some blocks
    lack is compared by the others alone, at full length.
    """
    present = np.stack([block.present for block in blocks])
    scale = 1 / np.sqrt(np.maximum(present.sum(axis=0), 1)).astype(np.float32)
    vectors = np.hstack([block.vectors for block in blocks]) * scale[:, None]
    return Features(vectors, present.sum(axis=0) > 0)


def _row_norms(block: Any) -> np.ndarray:
    from scipy.sparse import issparse
    from scipy.sparse.linalg import norm

    return np.asarray((norm if issparse(block) else np.linalg.norm)(block, axis=1))


def _dense(block: Any, seed: int) -> np.ndarray:
    """The block as float32, reduced by a truncated SVD (dot products kept) where it is large."""
    from scipy.sparse import issparse

    if np.prod(block.shape) > EXACT_ENTRIES and min(block.shape) > COMPONENTS:
        from sklearn.decomposition import TruncatedSVD

        reduced = TruncatedSVD(COMPONENTS, random_state=seed).fit_transform(block)
        return np.asarray(reduced, dtype=np.float32)
    return np.asarray(block.toarray() if issparse(block) else block, dtype=np.float32)
