"""The judge "absolute": an LLM that grades one answer at a time from 1 to 5; the higher grade wins.

Its grades also score the E-step: (grade - 1) / 4 is a similarity in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.judges.base import Grade, Judgement, Pair, decide, per_pair
from models.judges.llm import JudgeReply, LLMJudge
from models.judges.verdicts import parse_score
from models.policy import Messages, Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """A response that is to be graded."""

    response: str
    prompt: Messages = ()
    gold: str = ""
    """The gold response, which the judge sees where its settings say so (`show_gold`)."""
    principle: str = ""


class AbsoluteJudge(LLMJudge):
    """An LLM that grades one answer at a time from 1 to 5; the higher grade wins."""

    kind = "absolute"
    grades = True

    def compare(self, pairs: Sequence[Pair], advance: Progress | None = None) -> list[Judgement]:
        """See `Judge.compare`."""
        items = [
            Graded(prompt=p.prompt, response=answer, gold=p.gold, principle=p.principle)
            for p in pairs
            for answer in (p.ours, p.theirs)
        ]
        grades = iter(self.grade(items, per_pair(advance, len(pairs), len(items))))
        return [decide(next(grades), next(grades)) for _ in pairs]

    def grade(self, items: Sequence[Graded], progress: Progress | None = None) -> list[Grade]:
        """A grade from 1 to 5 for each response, or None with the reason.

        Args:
            progress: called with the number of responses that were graded.
        """
        known = [self._no_principle(item.principle) for item in items]
        asked = [item for item, missing in zip(items, known, strict=True) if missing is None]
        replies = iter(self._asker.ask([self._question(i) for i in asked], parse_score, progress))
        return [Grade(None, missing) if missing else _grade(next(replies)) for missing in known]

    def _question(self, item: Graded) -> Messages:
        gold = self._gold(item.gold)
        return self.prompter.absolute(
            item.prompt, item.response, gold=gold, principle=item.principle
        )


def _grade(reply: JudgeReply) -> Grade:
    return Grade(float(reply.result) if reply.result else None, reply.failure)
