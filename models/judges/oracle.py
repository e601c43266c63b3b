"""The judge "oracle": reads the truth of an embedded world out of the prompt. It only measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from constitutions.errors import UserError
from models.judges.base import Grade, Judge, Judgement, Pair, Resources, decide, each, listed
from models.policy import Progress
from models.worlds.base import Oracle


class OracleJudge(Judge):
    """Reads the truth of an embedded world out of the prompt: it measures, and teaches nothing."""

    kind = name = "oracle"
    needs_oracle = reads_principle = True

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle

    @classmethod
    def open(cls, settings: Any, given: Resources) -> OracleJudge:
        """See `Judge.open`."""
        assert given.oracle is not None, "`tasks.evaluate.check_judges` sees to it"
        return cls(given.oracle)

    def compare(self, pairs: Sequence[Pair], advance: Progress | None = None) -> list[Judgement]:
        """See `Judge.compare`."""
        return each(pairs, self._judge, advance)

    def _judge(self, pair: Pair) -> Judgement:
        return decide(self._grade(pair, pair.ours), self._grade(pair, pair.theirs))

    def _grade(self, pair: Pair, response: str) -> Grade:
        """By what the prompt calls for; or, where there is a constitution, by that alone."""
        prompt = pair.prompt[-1]["content"]
        try:
            if pair.principle:
                return Grade(self._oracle.obedience(prompt, listed(pair.principle), response))
            return Grade(self._oracle.score(prompt, response))
        except (UserError, ValueError) as error:
            return Grade(None, str(error))
