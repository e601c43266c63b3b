"""The judge "oracle": knows the truth about an embedded world's prompts. It only measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from constitutions.errors import UserError
from models.judges.base import Grade, Judge, Judgement, Pair, Resources, decide, each, listed
from models.policy import Progress
from models.worlds.base import Oracle


class OracleJudge(Judge):
    """Judges by the truth about an embedded world's prompts: it measures, and teaches nothing."""

    kind = name = "oracle"
    needs_oracle = reads_principle = True

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle

    @classmethod
    def open(cls, settings: Any, given: Resources) -> OracleJudge:
        """See `Judge.open`."""
        assert given.oracle is not None, "`tasks.evaluate.check_judges` refuses other prompts"
        return cls(given.oracle)

    def compare(self, pairs: Sequence[Pair], advance: Progress | None = None) -> list[Judgement]:
        """See `Judge.compare`."""
        return each(pairs, self._judge, advance)

    def _judge(self, pair: Pair) -> Judgement:
        return decide(self._grade(pair, pair.ours), self._grade(pair, pair.theirs))

    def _grade(self, pair: Pair, response: str) -> Grade:
        """The grade by what the prompt calls for; where there is a constitution, by that alone."""
        prompt = pair.prompt[-1]["content"]
        try:
            if pair.principle:
                return Grade(self._oracle.obedience(prompt, listed(pair.principle), response))
            return Grade(self._oracle.score(prompt, response))
        except (UserError, ValueError) as error:
            return Grade(None, str(error))
