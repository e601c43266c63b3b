"""The judge "similarity": the answer that is more similar to the gold response wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from models.judges.base import Grade, Judge, Judgement, Pair, Resources, Similarity, decide, each
from models.policy import Progress


class GoldSimilarity(Judge):
    """The answer that is more similar to the gold response wins."""

    kind = "similarity"
    needs_gold = True

    def __init__(self, similarity: Similarity, name: str) -> None:
        self.name = f"similarity:{name}"
        self._similarity = similarity

    @classmethod
    def open(cls, settings: Any, given: Resources) -> GoldSimilarity:
        """See `Judge.open`; the similarity is that of the stage `score`."""
        return cls(*given.similarity)

    def compare(self, pairs: Sequence[Pair], advance: Progress | None = None) -> list[Judgement]:
        """See `Judge.compare`."""
        return each(pairs, self._judge, advance)

    def _judge(self, pair: Pair) -> Judgement:
        golds = (pair.gold, *pair.other_golds)
        ours, theirs = self._similarity(golds, [pair.ours, pair.theirs])
        return decide(Grade(*ours), Grade(*theirs))
