"""What principles are compared by: their wording (characters, sentences, hidden states) and their
effect (what their refinements insert).

Every block has one row a principle. A row without a vector is marked absent, never a zero that
counts: `combine` takes the other blocks for it and says which rows have no vector at all.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from constitutions.constitution import principle_key
from models.engine.threads import pinned
from tasks.rows import Mined, Trajectory

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

EXACT_ENTRIES = 1 << 25
"""A sparse block is used as it is up to this many entries (128 MiB of float32), else reduced."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """The columns of a candidate that `insertions` reads."""

    principle: str
    refined: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposals:
    """The columns of a mined prompt that `insertions` reads."""

    initial: str
    candidates: tuple[Proposal, ...]


def distinct_principles(trajectories: Iterable[Trajectory]) -> list[Distinct]:
    """The kept principles without repetition (white space, case and final marks), by key."""
    spellings: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in trajectories:
        spellings[principle_key(row.principle)][" ".join(row.principle.split())] += 1
    return [
        Distinct(key=key, text=min(texts, key=lambda t: (-texts[t], t)), support=texts.total())
        for key, texts in sorted(spellings.items())
    ]


def insertions(
    distinct: Sequence[Distinct], mined: Iterable[Mined | Proposals]
) -> list[Counter[str]]:
    """For each principle the tokens in y2 and not in y1, over all candidates sampled with it."""
    effects: dict[str, Counter[str]] = {d.key: Counter() for d in distinct}
    for row in mined:
        found = [(effects.get(principle_key(c.principle)), c.refined) for c in row.candidates]
        kept = [(effect, refined) for effect, refined in found if effect is not None]
        before = tokens(row.initial) if kept else []
        for effect, refined in kept:
            effect += inserted_tokens(before, tokens(refined))
    return list(effects.values())


def character_features(texts: Sequence[str]) -> csr_matrix:
    """TF-IDF of the character 3- to 5-grams inside words; (texts, n-grams), unit rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), dtype=np.float32)
    return vectorizer.fit_transform(texts)


def inserted_tokens(before: Sequence[str], after: Sequence[str]) -> Counter[str]:
    """The tokens that `after` has more often than `before`, and how many more."""
    return Counter(after) - Counter(before)


def tokens(text: str) -> list[str]:
    """Lower-case words, single marks, and single characters of scripts without spaces."""
    return _TOKEN.findall(text.lower())


_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f"
"""Kana, Han and Thai."""
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


def effect_features(insertions: Sequence[Counter[str]]) -> csr_matrix:
    """Sublinear TF-IDF of the tokens that each principle's refinements inserted.

    Returns (principles, tokens) with unit rows; a principle that inserted nothing has an empty
    row, which `combine` takes for absent.
    """
    from sklearn.feature_extraction.text import TfidfTransformer

    counts = word_counts(insertions)
    return TfidfTransformer(sublinear_tf=True).fit_transform(counts) if counts.nnz else counts


def word_counts(insertions: Sequence[Counter[str]]) -> csr_matrix:
    """How often each principle's refinements inserted each word; (principles, words) float32.

    As scikit-learn's DictVectorizer counts them, in a fifth of its time; at least one column.
    """
    from scipy.sparse import csr_matrix

    words = {word: place for place, word in enumerate(sorted(set[str]().union(*insertions)))}
    ends = np.cumsum([0, *map(len, insertions)])
    columns = np.fromiter((words[word] for each in insertions for word in each), np.int32, ends[-1])
    counts = np.fromiter((n for each in insertions for n in each.values()), np.float32, ends[-1])
    found = csr_matrix((counts, columns, ends), shape=(len(insertions), max(len(words), 1)))
    found.sort_indices()
    return found


def centred(vectors: np.ndarray) -> np.ndarray:
    """Vectors less their mean: hidden states share one large direction."""
    offsets: np.ndarray = vectors - vectors.mean(axis=0)
    return offsets


@pinned()
def combine(blocks: Sequence[Any], seed: int = 0) -> Features:
    """Blocks of features side by side, each of the same weight.

    Args:
        blocks: (n, d_i) arrays or sparse matrices; an all-zero row is absent from that block.
        seed: of the randomised reduction that blocks of more than `EXACT_ENTRIES` go through.

    The cosine of two combined rows is the mean of their blocks' cosines. A row that some blocks
    lack is compared by the others alone, at full length.
    """
    from sklearn.preprocessing import normalize

    present: np.ndarray = np.stack([_row_norms(block) > 0 for block in blocks])
    scale = 1 / np.sqrt(np.maximum(present.sum(axis=0), 1)).astype(np.float32)
    parts = [_dense(normalize(block), seed) for block in blocks]
    return Features(np.hstack(parts) * scale[:, None], present.sum(axis=0) > 0)


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
