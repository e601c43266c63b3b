"""How well two texts' sentences match: BERTScore's F1 with sentences in the place of tokens.

Where a gold is another answer than the response, in other words, the cosine of whole texts and
ROUGE-L vary more with what both say anyway than with the one sentence that obeys a principle. Here
that sentence has a term of its own (Zhang et al. 2020, "BERTScore", section 3, without idf).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tasks.similarity.base import EMPTY, Score
from tasks.similarity.embedding import Embedding

_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n+")


class Sentences(Embedding):
    """F1 of the best matches' cosines between the sentences of both texts; negative ones are 0."""

    def compare(self, gold: str, texts: Sequence[str]) -> list[Score]:
        """See `Similarity.compare`."""
        split = {text: sentences(text) for text in (gold, *texts)}
        vectors = self.vectors([part for parts in split.values() for part in parts])
        scores = []
        for text in texts:
            sides = [[vectors[part] for part in split[of]] for of in (gold, text)]
            scores.append(_f1(*sides) if all(sides) else Score(None, _empty(gold)))
        return scores


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text, none of them empty."""
    return [part for part in map(str.strip, _END.split(text)) if part]


def _empty(gold: str) -> str:
    return EMPTY if gold.strip() else f"gold: {EMPTY}"


def _f1(gold: Sequence[np.ndarray | None], text: Sequence[np.ndarray | None]) -> Score:
    known = [[vector for vector in side if vector is not None] for side in (gold, text)]
    if not all(known):
        return Score(None, "no sentence has an embedding")
    cosines = np.clip(np.stack(known[0]) @ np.stack(known[1]).T, 0.0, 1.0)
    recall, precision = cosines.max(1).mean(), cosines.max(0).mean()
    both = float(recall + precision)
    return Score(2 * float(recall) * float(precision) / both if both else 0.0, None)
