"""The judge "auto": the oracle where the world has one, else the similarity to the gold."""

from __future__ import annotations

from models.judges.base import Judge
from models.judges.oracle import OracleJudge
from models.judges.similarity import GoldSimilarity
from models.worlds.base import Oracle


class AutoJudge(Judge):
    """Chooses the oracle or the similarity by `on`; it is never opened itself."""

    kind = "auto"

    @classmethod
    def on(cls, oracle: Oracle | None) -> type[Judge]:
        """See `Judge.on`."""
        return OracleJudge if oracle else GoldSimilarity
