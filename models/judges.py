"""Judges: which of two answers to the same prompt is better.

`tasks.evaluate` hands a judge pairs and reads one `Judgement` for each. A judge never raises for
one pair: what it cannot judge comes back as a failure with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from constitutions.errors import UserError
from models.policy import Message, Progress

TIE = 1e-9
"""Scores nearer than this are equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to one prompt; `gold` is for the judges that compare with it."""

    prompt: tuple[Message, ...]
    gold: str
    ours: str
    theirs: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The verdict on a pair: `outcome` 1 (ours is better), ½, 0, or None with the `failure`.

    A judge that compares without grading leaves the scores None.
    """

    outcome: float | None
    our_score: float | None = None
    their_score: float | None = None
    failure: str | None = None


class Grade(NamedTuple):
    """A score, or None with the reason why there is none."""

    score: float | None
    failure: str | None = None


class Judge(Protocol):
    """Says which of two answers is better."""

    @property
    def name(self) -> str:
        """What the record calls this judge."""
        ...

    def compare(self, pairs: Sequence[Pair], advance: Progress | None = None) -> list[Judgement]:
        """One judgement for each pair, in the order of the pairs."""
        ...


@runtime_checkable
class PrincipleJudge(Protocol):
    """Says whether a response follows the principle that it names."""

    def follows(self, principles: Sequence[str], responses: Sequence[str]) -> list[bool | None]:
        """Whether each response does what its principle asks; None where the judge failed.

        What is no principle at all cannot be followed: False.
        """
        ...


Similarity = Callable[[str, Sequence[str]], Sequence[tuple[float | None, str | None]]]
"""(gold, texts) to a score in [0, 1] for each text, or None with the reason."""


class GoldSimilarity:
    """The answer that is more similar to the gold response wins."""

    def __init__(self, similarity: Similarity, name: str) -> None:
        self.name = f"similarity:{name}"
        self._similarity = similarity

    def compare(self, pairs: Sequence[Pair], advance: Progress | None = None) -> list[Judgement]:
        """One judgement for each pair, in the order of the pairs."""
        return _each(pairs, self._judge, advance)

    def _judge(self, pair: Pair) -> Judgement:
        ours, theirs = self._similarity(pair.gold, [pair.ours, pair.theirs])
        return decide(Grade(*ours), Grade(*theirs))


class PlantedOracle:
    """Reads the planted truth out of the prompt: for measuring on the planted world, only."""

    name = "oracle"

    def compare(self, pairs: Sequence[Pair], advance: Progress | None = None) -> list[Judgement]:
        """One judgement for each pair, in the order of the pairs."""
        return _each(pairs, self._judge, advance)

    def follows(self, principles: Sequence[str], responses: Sequence[str]) -> list[bool | None]:
        """Whether each response shows the behaviour that its principle names."""
        from models.planted import oracle

        return [
            oracle.behaviour_of(principle) in oracle.shown(response)
            for principle, response in zip(principles, responses, strict=True)
        ]

    def _judge(self, pair: Pair) -> Judgement:
        return decide(self._grade(pair.prompt, pair.ours), self._grade(pair.prompt, pair.theirs))

    @staticmethod
    def _grade(prompt: Sequence[Message], response: str) -> Grade:
        from models.planted import oracle

        try:
            return Grade(oracle.score(prompt[-1]["content"], response))
        except (UserError, ValueError) as error:
            return Grade(None, str(error))


def _each(
    pairs: Sequence[Pair], judge: Callable[[Pair], Judgement], advance: Progress | None
) -> list[Judgement]:
    judgements = []
    for pair in pairs:
        judgements.append(judge(pair))
        if advance:
            advance(1)
    return judgements


def decide(ours: Grade, theirs: Grade) -> Judgement:
    """The better grade wins; grades within `TIE` are a tie; a missing or NaN grade is a failure."""
    for whose, grade in (("our", ours), ("their", theirs)):
        if grade.score is None or math.isnan(grade.score):
            reason = grade.failure or "the score is not a number"
            return Judgement(outcome=None, failure=f"{whose} answer: {reason}")
    assert ours.score is not None and theirs.score is not None
    margin = ours.score - theirs.score
    outcome = 0.5 if abs(margin) <= TIE else float(margin > 0)
    return Judgement(outcome=outcome, our_score=ours.score, their_score=theirs.score)


def choose_judge(
    choice: Literal["auto", "similarity", "oracle"], *, planted: bool, similarity: GoldSimilarity
) -> Judge:
    """The judge that the settings ask for; "auto" is the oracle where there is one.

    Raises:
        UserError: when the oracle is asked for and the prompts are not of the planted world.
    """
    if choice == "oracle" and not planted:
        raise UserError(
            "the oracle knows only the planted world's prompts",
            where="evaluate.judge",
            expected='"similarity" or "auto"',
        )
    return PlantedOracle() if planted and choice != "similarity" else similarity
