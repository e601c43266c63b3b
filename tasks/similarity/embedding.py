"""The cosine of two texts' sentence embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
from pydantic import Field

from models.embedders import check_embedder, sentence_embedder
from tasks.record.slot import Slot
from tasks.similarity.base import EMPTY, Chosen, Score, Similarity

REMEMBERED = 4096
"""Texts whose vectors are kept, so that each is embedded once while it is needed."""


class EmbeddingSettings(Chosen):
    """Settings of the similarity "embedding"."""

    embedding_model: str = Field(default="sentence-transformers/all-MiniLM-L6-v2", min_length=1)
    """A sentence-transformers model, for the embedding similarity: a folder, a hub name, or
    "all-minilm-l6-v2", the packaged one that `staple fetch` keeps."""


class Embedding(Similarity[EmbeddingSettings]):
    """The cosine of the embeddings; a negative one counts as 0."""

    @cached_property
    def embed(self) -> Callable[[Sequence[str]], np.ndarray]:
        """Texts to vectors, shape (texts, dimension)."""
        return sentence_embedder(self.settings.embedding_model)

    @cached_property
    def _vectors(self) -> dict[str, np.ndarray | None]:
        return {}

    def check(self) -> str:
        """See `Similarity.check`."""
        check_embedder(self.settings.embedding_model)
        return super().check()

    def noted(self, at: Slot) -> Slot:
        """See `Similarity.noted`."""
        return super().noted(at).using("models.embedders")

    def vectors(self, texts: Iterable[str]) -> dict[str, np.ndarray | None]:
        """Text → its vector of length 1, or None where it has none; each is embedded once."""
        if len(self._vectors) > REMEMBERED:
            self._vectors.clear()
        new = [t for t in dict.fromkeys(texts) if t.strip() and t not in self._vectors]
        if new:
            self._vectors.update(zip(new, _unit_vectors(self.embed(new), len(new)), strict=True))
        return self._vectors

    def compare(self, gold: str, texts: Sequence[str]) -> list[Score]:
        """See `Similarity.compare`."""
        vectors = self.vectors((gold, *texts))
        reference = vectors.get(gold)
        if reference is None:
            return [Score(None, f"gold: {_no_vector(gold)}")] * len(texts)
        return [
            Score(None, _no_vector(text))
            if (vector := vectors.get(text)) is None
            else Score(float(np.clip(vector @ reference, 0.0, 1.0)), None)
            for text in texts
        ]


def _unit_vectors(embedded: np.ndarray, texts: int) -> list[np.ndarray | None]:
    """Rows scaled to length 1, None where that is not possible."""
    rows = np.asarray(embedded, dtype=np.float64)
    if rows.ndim != 2 or len(rows) != texts:
        raise ValueError(f"the embedder gave shape {rows.shape} for {texts} texts")
    norms = np.linalg.norm(rows, axis=1)
    usable = np.isfinite(norms) & (norms > 0)
    return [row / norm if ok else None for row, norm, ok in zip(rows, norms, usable, strict=True)]


def _no_vector(text: str) -> str:
    return "its embedding is zero or not finite" if text.strip() else EMPTY
