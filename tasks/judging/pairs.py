"""Pairs of answers to one prompt, and the verdicts that need no judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from models.judges.base import Judgement, Pair
from tasks.policies.answers import Given, Which, given
from tasks.rows import Answer, Comparison, Prompt

OUTSIDE = -1
"""`Comparison.against` where the reference is no policy of the experiment."""


class Arm(NamedTuple):
    """Which of our answers is compared with which of the reference policy's."""

    answer: Which
    reference: Which


REFINED = Arm("refined", "refined")
INITIAL = Arm("initial", "initial")
IMPROVED = Arm("refined", "initial")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPair:
    """Two answers to one prompt; the first four fields are as `Comparison` has them."""

    iteration: int
    answer: str
    against: int
    reference: str
    prompt: Prompt
    ours: Given
    theirs: Given
    principle: str = ""
    """What both are to follow, where a rubric asks for it."""


def answer_pairs(
    answers: Sequence[Answer], references: Sequence[Answer], prompts: Sequence[Prompt]
) -> list[AnswerPair]:
    """Pairs of one policy's answers and another's, joined by prompt: one for every prompt and arm.

    The refined answer is compared with the refined answer, the first with the first. The refined
    answer is also compared with iteration 0's first answer (the paper's "initial policy"); and with
    its own policy's first answer where a policy is its own reference.

    Raises:
        ValueError: when either side is empty, mixes iterations or answers a prompt twice.
    """
    iteration, ours = _by_prompt(answers)
    against, theirs = _by_prompt(references)
    return [
        AnswerPair(
            iteration=iteration,
            answer=arm.answer,
            against=against,
            reference=arm.reference,
            prompt=p,
            ours=given(ours.get(p.prompt_id), arm.answer),
            theirs=given(theirs.get(p.prompt_id), arm.reference),
        )
        for arm in arms(iteration, against)
        for p in prompts
    ]


def principle_pairs(answers: Sequence[Answer], prompts: Sequence[Prompt]) -> list[AnswerPair]:
    """Each refinement against its own first response, under the principle that the policy named;
    answers without a principle are left out.

    Raises:
        ValueError: there is no answer, or they mix iterations or answer a prompt twice.
    """
    named = {row.prompt_id: row.principle for row in answers}
    return [
        replace(pair, principle=principle)
        for pair in answer_pairs(answers, answers, prompts)
        if (principle := named.get(pair.prompt.prompt_id))
    ]


def _by_prompt(answers: Sequence[Answer]) -> tuple[int, dict[str, Answer]]:
    rows = {a.prompt_id: a for a in answers}
    iterations = {a.iteration for a in answers}
    if len(iterations) != 1 or len(rows) != len(answers):
        raise ValueError(
            "expected one answer a prompt, all of one iteration; found "
            f"{len(answers)} answers to {len(rows)} prompts, iterations {sorted(iterations)}"
        )
    return iterations.pop(), rows


def arms(iteration: int, against: int) -> tuple[Arm, ...]:
    """The arms in which two iterations' policies are compared."""
    if iteration == against:
        return (IMPROVED,)
    return (REFINED, INITIAL, IMPROVED) if against == 0 else (REFINED, INITIAL)


def without_judge(pair: AnswerPair) -> Judgement | None:
    """The verdict that needs no judge: an answer is missing or empty, or there is no difference.

    An empty answer loses against any other: to leave it out would flatter a policy that often gives
    no answer. The same text on both sides is a tie.
    """
    for whose, side in (("our", pair.ours), ("their", pair.theirs)):
        if side.missing:
            return Judgement(outcome=None, failure=f"{whose} answer: {side.missing}")
    ours, theirs = bool(pair.ours.text.strip()), bool(pair.theirs.text.strip())
    if ours and theirs and pair.ours.text != pair.theirs.text:
        return None
    return Judgement(outcome=(1 + ours - theirs) / 2)


def as_judged(pair: AnswerPair) -> Pair:
    """The pair as a judge is given it."""
    return Pair(
        prompt=pair.prompt.prompt,
        gold=pair.prompt.gold,
        other_golds=pair.prompt.other_golds,
        ours=pair.ours.text,
        theirs=pair.theirs.text,
        principle=pair.principle,
    )


def comparison(pair: AnswerPair, judge: str, verdict: Judgement, *, asked: bool) -> Comparison:
    """The row that keeps a verdict; `asked`: whether it is the judge's own."""
    return Comparison(
        prompt_id=pair.prompt.prompt_id,
        iteration=pair.iteration,
        answer=pair.answer,
        against=pair.against,
        reference=pair.reference,
        judge=judge,
        ours=pair.ours.text,
        theirs=pair.theirs.text,
        our_score=verdict.our_score,
        their_score=verdict.their_score,
        outcome=verdict.outcome,
        failure=verdict.failure,
        asked=asked,
        verdicts=verdict.verdicts,
    )
