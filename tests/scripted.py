"""Policies that are programs, and a place to evaluate them: no download, no waiting.

What they say follows from what they read, and they write down what they were asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.judges.base import Judge
from models.judges.registry import JudgeSettings
from models.policy import (
    Completion,
    Message,
    Messages,
    Policy,
    PolicySettings,
    Progress,
    Request,
    Scoring,
)
from models.prompts import CHAT
from models.worlds.base import Oracle
from tasks.benchmarks.alpaca_eval.data import Annotation
from tasks.evaluate import EvaluateSettings, evaluate_stage
from tasks.judging.pairs import AnswerPair, answer_pairs
from tasks.judging.panel import Judges, judge_pairs
from tasks.policies.opening import PolicySource
from tasks.record.record import Attempt
from tasks.record.slot import Slot
from tasks.rows import Answer, Comparison, Prompt
from tasks.score import ScoreSettings

ENGINE: dict[str, Any] = {"dtype": "float32", "device": "cpu", "threads": 1, "quantization": "none"}
HELD_OUT = 7


def turns_of(request: Request) -> Messages:
    """The turns of a request that is a chat, not a text to continue."""
    assert not isinstance(request.messages, str)
    return request.messages


class Script:
    """A policy that says what `say` makes of the messages."""

    def __init__(self, say: Callable[[Sequence[Message]], str]) -> None:
        self.say = say
        self.asked: list[Request] = []

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[Completion]]:
        self.asked += requests
        if progress:
            progress(sum(r.n for r in requests))
        return [[self._said(r) for _ in range(r.n)] for r in requests]

    def _said(self, request: Request) -> Completion:
        text = self.say(turns_of(request))
        return Completion(text=text, tokens=3, logprob=-1.0, finish="stop")

    def logprobs(self, pairs: Sequence[tuple[tuple[Message, ...], str]]) -> list[Scoring]:
        raise AssertionError("evaluation only generates")

    def hidden_states(self, texts: Sequence[str]) -> np.ndarray:
        raise AssertionError("evaluation only generates")


def talker(
    initial: Callable[[str], str] = lambda asked: f"A plain answer to {asked}",
    refined: Callable[[str], str] = lambda first: f"{first} And here is why.",
    principle: str = "Give reasons.",
) -> Script:
    """y1 follows from the last thing that was asked, y2 from y1; z is always the same."""

    def say(messages: Sequence[Message]) -> str:
        earlier, last = messages[:-1], messages[-1]["content"]
        if last == CHAT.propose:
            return principle
        if last == CHAT.improve:
            return refined(earlier[-1]["content"])
        if last == CHAT.refine:
            return refined(earlier[-3]["content"])
        return initial(last)

    return Script(say)


@dataclass(frozen=True)
class ScriptedSource(PolicySource):
    """A policy source whose policy is a script."""

    script: Policy = field(default_factory=talker)

    def load(self) -> Policy:
        """The script."""
        return self.script


def responses(question: str) -> tuple[str, str]:
    """The two responses that a pairwise judge is shown, A's first, as they are quoted."""
    after = question.split("###Response A:\n")[1]
    first, _, rest = after.partition("\n\n###Response B:\n")
    return first, rest.partition("\n\n###")[0]


def pairwise(prefers: Callable[[str, str], str]) -> Script:
    """A judge that is shown two quoted responses and prefers "A" or "B"."""

    def say(messages: Sequence[Message]) -> str:
        return f"I have read both. [RESULT] {prefers(*responses(messages[-1]['content']))}"

    return Script(say)


def longer(a: str, b: str) -> str:
    """The longer response; of equally long ones the one whose letters come first."""
    return "A" if (-len(a), a) <= (-len(b), b) else "B"


def shorter(a: str, b: str) -> str:
    """The other one."""
    return "B" if longer(a, b) == "A" else "A"


def no_model(settings: JudgeSettings) -> Policy:
    raise AssertionError(f"no model was needed: {settings}")


def judges(
    oracle: Oracle | None = None, open_policy: Callable[[JudgeSettings], Policy] = no_model
) -> Judges:
    return Judges(str, oracle=oracle, scoring=ScoreSettings(), seed=0, open_policy=open_policy)


def decide_all(pairs: Sequence[AnswerPair], judge: Judge) -> list[Comparison]:
    """The rows of a judge that is open already, as the panel makes them."""
    settings, opened = JudgeSettings(), judges()
    opened._judge = settings, judge
    return judge_pairs(settings, "", opened, pairs, lambda count: None)


def compare(
    answers: Sequence[Answer], references: Sequence[Answer], prompts: Sequence[Prompt], judge: Judge
) -> list[Comparison]:
    return decide_all(answer_pairs(answers, references, prompts), judge)


def read_annotations(path: Path) -> list[Annotation]:
    """AlpacaEval's `annotations.json`, without the columns that we do not use."""
    return [Annotation.model_validate(row) for row in json.loads(path.read_text())]


@dataclass
class Place:
    """A record with held-out prompts, and what is needed to evaluate a policy on them."""

    model: Path
    at: Slot
    held_out: Attempt

    def judge(self, **how: Any) -> JudgeSettings:
        policy = PolicySettings(model=str(self.model), **ENGINE)
        return JudgeSettings(kind="pairwise", policy=policy, max_tokens=16, retries=1, **how)

    def settings(self, **how: Any) -> EvaluateSettings:
        given = {"judge": self.judge(), "resamples": 200} | how
        return EvaluateSettings(max_response_tokens=10, max_principle_tokens=5, **given)

    def source(self, script: Policy | None = None, **how: Any) -> PolicySource:
        policy = PolicySettings(model=str(self.model), **ENGINE)
        return ScriptedSource(policy, str(self.model), "digest", script=script or talker(), **how)

    def run(self, judge: Policy, script: Policy | None = None, **how: Any) -> Attempt:
        guided = how.pop("guided", True)
        return self.evaluate(self.settings(**how), lambda _: judge, script, guided=guided)

    def evaluate(
        self,
        settings: EvaluateSettings,
        open_policy: Callable[[JudgeSettings], Policy],
        script: Policy | None = None,
        **how: Any,
    ) -> Attempt:
        source = self.source(script, **how)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tasks.evaluate.open_policy", open_policy)
            return evaluate_stage(self.at, settings, ScoreSettings(), source, self.held_out)
