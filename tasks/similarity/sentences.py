"""How well two texts' sentences match: BERTScore's F1 with sentences in the place of tokens.

Where a gold is another answer than the response, in other words, the cosine of whole texts and
ROUGE-L vary more with what both say anyway than with the one sentence that obeys a principle. Here
that sentence has a term of its own (Zhang et al. 2020, "BERTScore", section 3, without idf).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tasks.similarity.embedding import Embedding

_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n+")


class Sentences(Embedding):
    """F1 of the best matches' cosines between the sentences of both texts; negative ones are 0."""

    @staticmethod
    def parts(text: str) -> list[str]:
        """The sentences and lines of a text, none of them empty."""
        return [part for part in map(str.strip, _END.split(text)) if part]

    @staticmethod
    def near(gold: Sequence[np.ndarray], text: Sequence[np.ndarray]) -> float:
        """See `Embedding.near`."""
        cosines = np.clip(np.stack(gold) @ np.stack(text).T, 0.0, 1.0)
        recall, precision = float(cosines.max(1).mean()), float(cosines.max(0).mean())
        return 2 * recall * precision / (recall + precision) if recall + precision else 0.0
