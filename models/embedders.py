"""Vectors for principles: of what they say (characters, sentences) and of what they do (effect).

Every block has one row a principle. A row without a vector is marked absent, never a silent zero:
`combine` lets the other blocks speak for it and says which rows have no vector at all.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from constitutions.errors import UserError
from models.checkpoints.architecture import first_line
from models.checkpoints.headers import check_listing, read_object, read_tensors
from models.engine.threads import pinned

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts to unit vectors, shape (texts, dimensions), float32."""

EXACT_ENTRIES = 1 << 25
"""A sparse block is used as it is up to this many entries (128 MiB of float32), else reduced."""
COMPONENTS = 256
"""Singular vectors that a larger block is reduced to."""


@dataclass(frozen=True, slots=True)
class Features:
    """`vectors`: (n, d) float32, rows of length one (below one where a block was reduced).

    `present`: (n,) bool, False where no block had anything to say of that row.
    """

    vectors: np.ndarray
    present: np.ndarray


def sentence_embedder(
    model: str, *, device: str = "cpu", batch_size: int = 64, trust_remote_code: bool = False
) -> Embed:
    """A sentence-transformers model, from a directory or by its hub name, as a function.

    Raises:
        UserError: the directory is missing or holds no model, or the name cannot be loaded.
        ValueError: (from the function) a text has no finite, non-zero vector.
    """
    check_embedder(model)
    from sentence_transformers import SentenceTransformer

    try:
        encoder = SentenceTransformer(
            model,
            device=device,
            trust_remote_code=trust_remote_code,
            model_kwargs={"use_safetensors": True},  # nothing is unpickled
        )
    except MemoryError:
        raise
    except Exception as error:  # each library raises its own kinds for a file that is malformed
        raise UserError(
            f"the embedding model cannot be loaded ({first_line(error)})",
            where=f"embedding_model '{model}'",
            expected="a sentence-transformers directory, or a hub name that can be downloaded",
        ) from error

    def embed(texts: Sequence[str]) -> np.ndarray:
        with pinned(None):
            vectors = encoder.encode(list(texts), batch_size=batch_size, show_progress_bar=False)
        return unit_rows(np.asarray(vectors, dtype=np.float32), texts)

    return embed


def unit_rows(vectors: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """The rows scaled to length one; ValueError names the first text that has no direction."""
    norms = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if bad.size:
        raise ValueError(f"{bad.size} of {len(texts)} texts have no embedding: {texts[bad[0]]!r} …")
    scaled: np.ndarray = vectors / norms[:, None]
    return scaled


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
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.feature_extraction.text import TfidfTransformer

    if not any(insertions):
        return csr_matrix((len(insertions), 1), dtype=np.float32)
    counts = DictVectorizer(dtype=np.float32).fit_transform(insertions)
    return TfidfTransformer(sublinear_tf=True).fit_transform(counts)


def centred(vectors: np.ndarray) -> np.ndarray:
    """Vectors less their mean: hidden states share one large direction that tells nothing."""
    offsets: np.ndarray = vectors - vectors.mean(axis=0)
    return offsets


@pinned()
def combine(blocks: Sequence[Any], seed: int = 0) -> Features:
    """Blocks of features side by side, each of the same weight.

    Args:
        blocks: (n, d_i) arrays or sparse matrices; an all-zero row is absent from that block.
        seed: of the randomised reduction that blocks of more than `EXACT_ENTRIES` go through.

    The cosine of two combined rows is the mean of their blocks' cosines. A row that some blocks
    lack is carried by the others alone, at full length.
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


def check_embedder(model: str) -> None:
    """Refuse what names a directory (not a hub's "owner/name") and holds no whole model.

    Raises:
        UserError: there is no such directory, or its configuration or weights are malformed.
    """
    path = Path(model).expanduser()
    looks_local = path.is_absolute() or model.startswith((".", "~")) or model.count(os.sep) > 1
    if not path.is_dir():
        if looks_local:
            raise UserError("there is no such directory", where=f"embedding_model '{model}'")
    elif not any((path / name).is_file() for name in ("modules.json", "config.json")):
        raise UserError(
            "the directory holds no model",
            where=f"embedding_model '{model}'",
            expected="modules.json (sentence-transformers) or config.json (transformers)",
        )
    elif (path / "config.json").exists():
        read_object(path / "config.json")
        check_listing(path)
        read_tensors(path)
