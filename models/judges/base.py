"""Judges: which of two answers to the same prompt is better.

`tasks.evaluate` hands a judge pairs and reads one `Judgement` for each. A judge never raises for
one pair: what it cannot judge comes back as a failure with its reason.

The judges that need no model are here; `models.judges.llm` and `models.judges.reward` hold the
others, and `models.judges.opening` opens any of them by its settings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import Field, model_validator

from constitutions.errors import UserError
from models.policy import Message, PolicySettings, Progress
from models.settings import Settings
from models.worlds.base import Oracle
from models.worlds.registry import WORLD_MODELS

TIE = 1e-9
"""Scores nearer than this are equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to one prompt; `gold` is for the judges that compare with it."""

    prompt: tuple[Message, ...]
    gold: str
    ours: str
    theirs: str
    principle: str = ""
    """What both are to follow: a principle, or several as `numbered` lines. Read by the oracle and
    by rubrics about principles."""


def numbered(principles: Sequence[str]) -> str:
    """Principles as a judge reads them: numbered lines, or the only one as it is."""
    if len(principles) == 1:
        return principles[0]
    return "\n".join(f"{number}. {text}" for number, text in enumerate(principles, start=1))


def listed(text: str) -> list[str]:
    """The principles of `numbered` lines."""
    return [re.sub(r"^\d+\. ", "", line) for line in text.splitlines()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a judge said when it saw the two answers in one of the two orders."""

    ours_first: bool
    outcome: float | None
    """1 (ours is better), ½, 0, or None with the `failure`: always from our side."""
    feedback: str = ""
    """The judge's reasons, in its own words."""
    failure: str | None = None
    attempts: int = 1
    tokens: int = 0
    """Generated tokens of all attempts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The verdict on a pair: `outcome` 1 (ours is better), ½, 0, or None with the `failure`.

    A judge that compares without grading leaves the scores None. One that reads the answers one
    after the other gives the verdicts of both orders (ours first, then theirs first).
    """

    outcome: float | None
    our_score: float | None = None
    their_score: float | None = None
    failure: str | None = None
    verdicts: tuple[Verdict, ...] = ()


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

    @property
    def ordered(self) -> bool:
        """Whether it may matter which answer is read first: then there are `verdicts`."""
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

    ordered = False

    def __init__(self, similarity: Similarity, name: str) -> None:
        self.name = f"similarity:{name}"
        self._similarity = similarity

    def compare(self, pairs: Sequence[Pair], advance: Progress | None = None) -> list[Judgement]:
        """One judgement for each pair, in the order of the pairs."""
        return _each(pairs, self._judge, advance)

    def _judge(self, pair: Pair) -> Judgement:
        ours, theirs = self._similarity(pair.gold, [pair.ours, pair.theirs])
        return decide(Grade(*ours), Grade(*theirs))


class OracleJudge:
    """Reads the truth of an embedded world out of the prompt: it measures, and teaches nothing."""

    name = "oracle"
    ordered = False

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle

    def compare(self, pairs: Sequence[Pair], advance: Progress | None = None) -> list[Judgement]:
        """One judgement for each pair, in the order of the pairs."""
        return _each(pairs, self._judge, advance)

    def follows(self, principles: Sequence[str], responses: Sequence[str]) -> list[bool | None]:
        """Whether each response shows the behaviour that its principle names."""
        return [
            self._oracle.behaviour_of(principle) in self._oracle.shown(response)
            for principle, response in zip(principles, responses, strict=True)
        ]

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


def _each(
    pairs: Sequence[Pair], judge: Callable[[Pair], Judgement], advance: Progress | None
) -> list[Judgement]:
    judgements = []
    for pair in pairs:
        judgements.append(judge(pair))
        if advance:
            advance(1)
    return judgements


def decide(ours: Grade, theirs: Grade, tie: float = TIE) -> Judgement:
    """The better grade wins; grades within `tie` are a tie; a missing or NaN grade is a failure."""
    for whose, grade in (("our", ours), ("their", theirs)):
        if grade.score is None or math.isnan(grade.score):
            reason = grade.failure or "the score is not a number"
            return Judgement(outcome=None, failure=f"{whose} answer: {reason}")
    assert ours.score is not None and theirs.score is not None
    margin = ours.score - theirs.score
    outcome = 0.5 if abs(margin) <= tie else float(margin > 0)
    return Judgement(outcome=outcome, our_score=ours.score, their_score=theirs.score)


def combine(ours_first: Verdict, theirs_first: Verdict) -> Judgement:
    """Both orders as one judgement: what they agree on, else a tie (as MT-Bench counts games).

    One failed order is a failed judgement: the other alone would bring its position bias along.
    """
    verdicts = (ours_first, theirs_first)
    failed = [
        f"{'our' if v.ours_first else 'their'} answer first: {v.failure}"
        for v in verdicts
        if v.outcome is None
    ]
    if failed:
        return Judgement(outcome=None, failure="; ".join(failed), verdicts=verdicts)
    agreed = ours_first.outcome == theirs_first.outcome
    return Judgement(outcome=ours_first.outcome if agreed else 0.5, verdicts=verdicts)


def per_pair(advance: Progress | None, pairs: int, steps: int) -> Progress | None:
    """A callback for each of `steps` that tells `advance` how many of the `pairs` they make."""
    done = told = 0

    def tick(count: int) -> None:
        nonlocal done, told
        done += count
        now = pairs * done // steps
        if advance and now > told:
            advance(now - told)
            told = now

    return tick if advance else None


class Rubric(Settings):
    """What an LLM judge is to look at, in Prometheus-2's shape."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """What the record calls it."""
    criterion: str = Field(min_length=1)
    """The question that the judge answers."""
    scores: tuple[str, str, str, str, str]
    """What an answer of score 1, 2, 3, 4 and 5 is like (absolute judging only)."""
    ties: bool = False
    """Whether a pairwise judge may call a tie. Prometheus-2 was not trained to."""
    principle: bool = False
    """Whether the judge is shown the principle that the answers are to follow."""


HELPFULNESS = Rubric(
    name="helpfulness",
    criterion="Does the response give the user what the request needs, correctly and clearly?",
    scores=(
        "The response is wrong, harmful or beside the request.",
        "The response touches the request, but fails most of what it needs.",
        "The response does part of what the request needs; there are errors or gaps that matter.",
        "The response does what the request needs, with small errors or gaps.",
        "The response does all that the request needs: correct, complete and clear.",
    ),
)
PRINCIPLE = Rubric(
    name="principle",
    criterion="Does the response follow the principle that is stated above?",
    scores=(
        "The response ignores the principle or goes against it.",
        "The response shows a trace of the principle, but mostly does not follow it.",
        "The response follows the principle in part; there are clear lapses.",
        "The response follows the principle, with small lapses.",
        "The response follows the principle fully, wherever it applies.",
    ),
    principle=True,
)
"""For the principle-following win rate: does the refinement follow the principle it names?"""
RUBRICS = {rubric.name: rubric for rubric in (HELPFULNESS, PRINCIPLE)}

BESIDE = ("endpoint", "key_variable")
"""Settings of a judge's model that may stand beside it."""
Kind = Literal["auto", "similarity", "oracle", "pairwise", "absolute", "reward"]


class JudgeSettings(Settings):
    """Who compares answers, and how."""

    kind: Kind = "auto"
    """"similarity" to the gold response; an embedded world's "oracle"; an LLM that compares two
    answers in both orders ("pairwise") or grades each from 1 to 5 ("absolute"); a scalar "reward"
    model. "auto" is the oracle where the world has one, else similarity."""
    policy: PolicySettings | None = None
    """The judge's own model, for "pairwise", "absolute" and "reward". It has no adapter, and does
    not use `templates`. Its `endpoint` and `key_variable` may stand beside it as well as in it."""
    rubric: Literal["helpfulness", "principle"] | Rubric = "helpfulness"
    """What an LLM judge looks at: a rubric by name, or one of your own."""
    show_gold: bool = False
    """Show the gold response to an LLM judge, as the reference answer."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """Of an LLM judge; 0 is greedy."""
    max_tokens: int = Field(default=1024, ge=1, le=16_384)
    """Longest judgement; one that is cut is a failed one."""
    retries: int = Field(default=2, ge=0, le=20)
    """How often an LLM judge is asked again when its judgement has no result. A greedy one would
    only repeat itself: its retries are sampled."""
    reward_tie: float = Field(default=1e-4, ge=0)
    """Rewards nearer than this are equal."""

    @model_validator(mode="before")
    @classmethod
    def _moved_in(cls, values: Any) -> Any:
        """What stands beside the model about its endpoint belongs to it."""
        policy = values.get("policy") if isinstance(values, dict) else None
        inside = policy.model_dump() if isinstance(policy, PolicySettings) else policy or {}
        if not isinstance(values, dict) or not isinstance(inside, dict):
            return values
        own = {k: v for k, v in values.items() if k not in BESIDE}
        beside = {k: v for k, v in values.items() if k in BESIDE}
        needed = policy is not None or any(beside.values())
        return own | {"policy": inside | beside} if beside and needed else own

    @model_validator(mode="after")
    def _has_a_model(self) -> JudgeSettings:
        needs = self.kind in ("pairwise", "absolute", "reward")
        if needs and (self.policy is None or self.policy.model in WORLD_MODELS):
            raise ValueError(f"a {self.kind} judge needs a model of its own: set policy.model")
        if self.policy and self.policy.endpoint and self.kind not in ("pairwise", "absolute"):
            raise ValueError(f"a {self.kind} judge runs in process: leave endpoint unset")
        return self

    @property
    def chosen_rubric(self) -> Rubric:
        """The rubric itself."""
        return RUBRICS[self.rubric] if isinstance(self.rubric, str) else self.rubric
