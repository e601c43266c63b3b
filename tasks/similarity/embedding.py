"""The cosine of two texts' sentence embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from functools import cached_property

import numpy as np
from pydantic import Field

from models.embedders import check_embedder, sentence_embedder, unit_rows
from tasks.policies.base import noted_embedder
from tasks.record.slot import Slot
from tasks.similarity.base import EMPTY, Chosen, Score, Similarity, nearest


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

    def check(self) -> str:
        """See `Similarity.check`."""
        check_embedder(self.settings.embedding_model)
        return super().check()

    def noted(self, at: Slot) -> Slot:
        """See `Similarity.noted`."""
        return noted_embedder(super().noted(at), self.settings.embedding_model)

    @staticmethod
    def parts(text: str) -> list[str]:
        """What of a text is embedded: the whole."""
        return [text] if text.strip() else []

    def compare(self, gold: str, texts: Sequence[str]) -> list[Score]:
        """See `Similarity.compare`."""
        return self.best([gold], texts)

    def best(self, golds: Sequence[str], texts: Sequence[str]) -> list[Score]:
        """See `Similarity.best`.

        The texts are embedded together, each once, and none is remembered: vectors differ in their
        last digits between batches, and a score must not depend on what was scored before it.
        """
        vectors = self._vectors({part for text in (*golds, *texts) for part in self.parts(text)})
        found = {
            text: [vector for part in self.parts(text) if (vector := vectors[part]) is not None]
            for text in (*golds, *texts)
        }
        return nearest([[self._score(gold, text, found) for text in texts] for gold in golds])

    def _vectors(self, parts: Set[str]) -> dict[str, np.ndarray | None]:
        """Part → its vector of length 1, or None where it has none."""
        ordered = sorted(parts)
        rows = np.asarray(self.embed(ordered), dtype=np.float64) if ordered else np.zeros((0, 1))
        if rows.ndim != 2 or len(rows) != len(ordered):
            raise ValueError(f"the embedder gave shape {rows.shape} for {len(ordered)} texts")
        unit = unit_rows(rows)
        return {p: row if row.any() else None for p, row in zip(ordered, unit, strict=True)}

    def _score(self, gold: str, text: str, vectors: Mapping[str, list[np.ndarray]]) -> Score:
        if not vectors[gold]:
            return Score(None, f"gold: {_no_vector(gold)}")
        if not vectors[text]:
            return Score(None, _no_vector(text))
        return Score(self.near(vectors[gold], vectors[text]), None)

    @staticmethod
    def near(gold: Sequence[np.ndarray], text: Sequence[np.ndarray]) -> float:
        """How near the vectors of two texts' parts are, in [0, 1]; each has one at least."""
        return float(np.clip(gold[0] @ text[0], 0.0, 1.0))


def _no_vector(text: str) -> str:
    return "its embedding is zero or not finite" if text.strip() else EMPTY
