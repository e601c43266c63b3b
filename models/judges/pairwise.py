"""The judge "pairwise": an LLM that says which of two answers is better, asked in both orders."""

from __future__ import annotations

from collections.abc import Sequence

from models.judges.base import Judgement, Pair, Verdict, combine, per_pair
from models.judges.llm import JudgeReply, LLMJudge
from models.judges.verdicts import parse_choice
from models.policy import Messages, Progress


class PairwiseJudge(LLMJudge):
    """An LLM that says which of two answers is better, asked in both orders (see `combine`)."""

    kind = "pairwise"
    both_orders = True

    def compare(self, pairs: Sequence[Pair], advance: Progress | None = None) -> list[Judgement]:
        """See `Judge.compare`; each judgement has two verdicts, one for each order."""
        known = [self._no_principle(pair.principle) for pair in pairs]
        asked = [pair for pair, missing in zip(pairs, known, strict=True) if missing is None]
        questions = [self._question(p, ours_first) for p in asked for ours_first in (True, False)]
        ties = self.prompter.rubric.ties
        replies = iter(
            self._asker.ask(
                questions,
                lambda text: parse_choice(text, ties=ties),
                per_pair(advance, len(asked), len(questions)),
            )
        )
        return [
            Judgement(outcome=None, failure=missing)
            if missing
            else combine(_verdict(next(replies), True), _verdict(next(replies), False))
            for missing in known
        ]

    def _question(self, pair: Pair, ours_first: bool) -> Messages:
        first, second = (pair.ours, pair.theirs) if ours_first else (pair.theirs, pair.ours)
        return self.prompter.pairwise(
            pair.prompt, first, second, gold=self._gold(pair.gold), principle=pair.principle
        )


def _verdict(reply: JudgeReply, ours_first: bool) -> Verdict:
    outcome = {"A": float(ours_first), "B": float(not ours_first), "TIE": 0.5}
    return Verdict(
        ours_first=ours_first,
        outcome=outcome[reply.result] if reply.result else None,
        feedback=reply.feedback,
        failure=reply.failure,
        attempts=reply.attempts,
        tokens=reply.tokens,
    )
