"""What a judge is: it says which of two answers to the same prompt is better.

Each kind of judge is a class in a file of its own, which declares what it needs and what it can do;
`models.judges.registry` lists them. The panel (`tasks.judging.panel`) gives a judge pairs and reads
one `Judgement` for each. A judge raises no error for one pair: a pair that it cannot judge gets a
failure with its reason.
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
"""Scores that differ by at most this much are a tie."""
BESIDE = ("endpoint", "key_variable")
"""Settings of a judge's model that may stand beside `policy` as well as in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to one prompt."""

    prompt: tuple[Message, ...]
    gold: str
    """The gold response, for judges that compare with it."""
    ours: str
    theirs: str
    other_golds: tuple[str, ...] = ()
    """Further references, for the judge "similarity": the nearest counts."""
    principle: str = ""
    """What both answers are to follow: a principle, or several as `numbered` lines. The oracle and
    rubrics about principles read it."""


def numbered(principles: Sequence[str]) -> str:
    """Principles as a judge reads them: numbered lines, or a single one as it is."""
    if len(principles) == 1:
        return principles[0]
    return "\n".join(f"{number}. {text}" for number, text in enumerate(principles, start=1))


def listed(text: str) -> list[str]:
    """The principles in the text that `numbered` makes."""
    return [re.sub(r"^\d+\. ", "", line) for line in text.splitlines()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A judge's decision when it sees the two answers in one of the two orders."""

    ours_first: bool
    """Whether the judge reads our answer first."""
    outcome: float | None
    """1 (ours is better), ½ (a tie), 0, or None with the `failure`; always from our side."""
    feedback: str = ""
    """The judge's reasons, in its own words."""
    failure: str | None = None
    """Why there is no outcome."""
    attempts: int = 1
    """How often the judge was asked."""
    tokens: int = 0
    """Generated tokens of all attempts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The decision on a pair: `outcome` 1 (ours is better), ½, 0, or None with the `failure`.

    A judge that grades each answer gives both scores. One that reads both answers at once gives the
    verdicts of both orders (ours first, then theirs first).
    """

    outcome: float | None
    our_score: float | None = None
    their_score: float | None = None
    failure: str | None = None
    verdicts: tuple[Verdict, ...] = ()


class Grade(NamedTuple):
    """A score, or None and the reason why there is none (`failure`)."""

    score: float | None
    failure: str | None = None


Similarity = Callable[[Sequence[str], Sequence[str]], Sequence[tuple[float | None, str | None]]]
"""(golds, texts) to (score in [0, 1], None) for each text, or to (None, reason)."""


class KindSettings(Settings):
    """The settings of every kind of judge; a kind that needs more adds its own."""

    kind: str = "auto"
    policy: PolicySettings | None = None
    """The judge's own model, for the kinds that have one. It has no adapter, and does not use
    `templates`. Its `endpoint` and `key_variable` may stand beside it as well as in it."""

    @model_validator(mode="before")
    @classmethod
    def _moved_in(cls, values: Any) -> Any:
        """Move the settings `BESIDE` the model into it."""
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
    """What a judge can be opened with."""

    @property
    def seed(self) -> int:
        """The seed of a judge that samples."""

    @property
    def oracle(self) -> Oracle | None:
        """The oracle that knows the truth of the prompts; None where there is none."""

    @property
    def similarity(self) -> tuple[Similarity, str]:
        """The similarity that the stage `score` uses, and its name."""

    def model(self, settings: Any) -> Policy:
        """The language model that the judge's settings name, in memory or at its endpoint."""


class Judge(ABC):
    """A kind of judge, which declares what it needs and can do: no caller asks for its name."""

    kind: ClassVar[str]
    """Its word in the settings, `judge: {kind: …}`."""
    needs_gold: ClassVar[bool] = False
    """It compares the answers with the gold response."""
    needs_oracle: ClassVar[bool] = False
    """It asks the oracle of an embedded world, so it can judge that world's prompts only."""
    needs_model: ClassVar[bool] = False
    """It judges with a model of its own: `policy.model`."""
    generates: ClassVar[bool] = False
    """Its model is a language model, which answers in words by a rubric, in at most `max_tokens`
    tokens. Only such a model may stand behind an endpoint."""
    grades: ClassVar[bool] = False
    """It also grades a single answer, from 1 to 5."""
    reads_principle: ClassVar[bool] = False
    """It sees the principle or the constitution that the answers are to follow."""
    both_orders: ClassVar[bool] = False
    """It reads both answers at once, in both orders; its judgements have `verdicts`."""

    name: str
    """What the record calls this judge."""

    @classmethod
    def on(cls, oracle: Oracle | None) -> type[Judge]:
        """The kind that judges these prompts: itself, except for "auto"."""
        return cls

    @classmethod
    def title(cls, settings: Any) -> str:
        """The judge's name, as far as its settings determine it."""
        return cls.kind

    @classmethod
    @abstractmethod
    def open(cls, settings: Any, given: Resources) -> Judge:
        """The judge, with its model in memory.

        Args:
            settings: `models.judges.registry.JudgeSettings`, or the part of it that the kind reads.

        Raises:
            UserError: its model cannot be loaded.
        """

    @abstractmethod
    def compare(self, pairs: Sequence[Pair], advance: Progress | None = None) -> list[Judgement]:
        """One judgement for each pair, in the same order.

        Args:
            advance: called with the number of pairs that were judged.
        """


def each(
    pairs: Sequence[Pair], judge: Callable[[Pair], Judgement], advance: Progress | None
) -> list[Judgement]:
    """The judgements of a judge that judges one pair at a time; `advance` counts pairs."""
    judgements = []
    for pair in pairs:
        judgements.append(judge(pair))
        if advance:
            advance(1)
    return judgements


def decide(ours: Grade, theirs: Grade, tie: float = TIE) -> Judgement:
    """The judgement of two grades: the higher one wins, grades within `tie` are a tie, and a grade
    that is missing or NaN is a failure."""
    for whose, grade in (("our", ours), ("their", theirs)):
        if grade.score is None or math.isnan(grade.score):
            reason = grade.failure or "the score is not a number"
            return Judgement(outcome=None, failure=f"{whose} answer: {reason}")
    assert ours.score is not None and theirs.score is not None
    margin = ours.score - theirs.score
    outcome = 0.5 if abs(margin) <= tie else float(margin > 0)
    return Judgement(outcome=outcome, our_score=ours.score, their_score=theirs.score)


def combine(ours_first: Verdict, theirs_first: Verdict) -> Judgement:
    """One judgement of both orders: the outcome that they share, else a tie (as in MT-Bench).

    Where one order has failed the judgement fails: the other alone would add its position bias.
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
    """A callback that counts `steps` and reports them to `advance` as whole pairs."""
    done = reported = 0

    def tick(count: int) -> None:
        nonlocal done, reported
        done += count
        now = pairs * done // steps
        if advance and now > reported:
            advance(now - reported)
            reported = now

    return tick if advance else None
