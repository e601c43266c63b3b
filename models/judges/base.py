"""What a judge is: it says which of two answers to the same prompt is better.

Each kind of judge is one class in a file of its own, which declares what it needs and what it can
do; `models.judges.registry` lists them. The panel (`tasks.judging.panel`) hands a judge pairs and
reads one `Judgement` for each. A judge never raises for one pair: what it cannot judge comes back
as a failure with its reason.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from pydantic import model_validator

from models.policy import Message, Policy, PolicySettings, Progress
from models.settings import Settings
from models.worlds.base import Oracle

TIE = 1e-9
"""Scores nearer than this are equal."""
BESIDE = ("endpoint", "key_variable")
"""Settings of a judge's model that may stand beside it."""


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


Similarity = Callable[[str, Sequence[str]], Sequence[tuple[float | None, str | None]]]
"""(gold, texts) to a score in [0, 1] for each text, or None with the reason."""


class KindSettings(Settings):
    """What the settings of every kind of judge have; a kind with more settings adds its own."""

    kind: str = "auto"
    policy: PolicySettings | None = None
    """The judge's own model, for the kinds that have one. It has no adapter, and does not use
    `templates`. Its `endpoint` and `key_variable` may stand beside it as well as in it."""

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

    @property
    def model_name(self) -> str:
        """What the record calls the judge's model: the last part of its path or hub name."""
        return self.policy.model.rstrip("/").rsplit("/", 1)[-1] if self.policy else "policy"


class Resources(Protocol):
    """What a kind of judge may be opened with."""

    @property
    def seed(self) -> int:
        """Of a judge that samples."""
        ...

    @property
    def oracle(self) -> Oracle | None:
        """Who knows the truth of the prompts; None where nobody does."""
        ...

    @property
    def similarity(self) -> tuple[Similarity, str]:
        """The similarity of `score`, and its name."""
        ...

    def model(self, settings: Any) -> Policy:
        """The language model that the judge's settings name, in memory or at its endpoint."""
        ...


class Judge(ABC):
    """A kind of judge, and what it needs and can do: others ask for that, not for its name."""

    kind: ClassVar[str]
    """Its word in the settings, `judge: {kind: …}`."""
    needs_gold: ClassVar[bool] = False
    """It compares the answers with the gold response."""
    needs_oracle: ClassVar[bool] = False
    """It asks the oracle of an embedded world, and can judge no other prompts."""
    needs_model: ClassVar[bool] = False
    """It judges with a model of its own: `policy.model`."""
    generates: ClassVar[bool] = False
    """Its model is a language model that answers in words, by a rubric and at most `max_tokens`
    long. Only such a model can be asked at an endpoint."""
    grades: ClassVar[bool] = False
    """It also grades a single answer, from 1 to 5."""
    reads_principle: ClassVar[bool] = False
    """It sees the principle or the constitution that the answers are to follow."""
    both_orders: ClassVar[bool] = False
    """It reads both answers at once, in both orders: then a judgement has `verdicts`."""

    name: str
    """What the record calls this judge."""

    @classmethod
    def on(cls, oracle: Oracle | None) -> type[Judge]:
        """The kind that judges these prompts: itself, except for "auto"."""
        return cls

    @classmethod
    def title(cls, settings: Any) -> str:
        """The judge's name as far as its settings tell it."""
        return cls.kind

    @classmethod
    @abstractmethod
    def open(cls, settings: Any, given: Resources) -> Judge:
        """The judge, its model in memory.

        Args:
            settings: `models.judges.registry.JudgeSettings`, or the part of it that the kind reads.

        Raises:
            UserError: its model cannot be loaded.
        """

    @abstractmethod
    def compare(self, pairs: Sequence[Pair], advance: Progress | None = None) -> list[Judgement]:
        """One judgement for each pair, in the order of the pairs; `advance` counts pairs."""


def each(
    pairs: Sequence[Pair], judge: Callable[[Pair], Judgement], advance: Progress | None
) -> list[Judgement]:
    """The judgements of a judge that reads one pair after the other."""
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
