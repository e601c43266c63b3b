"""A policy's answers to prompts, without any gold response: y1, then z, then y2.

`tasks.evaluate` answers held-out prompts and benchmarks with it, `flows.commands.ask` a person's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from models import prompts as ask
from models.policy import (
    NO_ANSWER,
    Completion,
    Messages,
    Policy,
    Progress,
    Request,
    finish_of,
    no_answer,
    vote,
)
from models.pools.base import Compute, Pool
from models.prompts import Templates
from models.settings import Settings
from tasks.record.work import Workspace
from tasks.rows import Answer, Prompt

Row = TypeVar("Row")
Which = Literal["refined", "initial"]
"""Which of a policy's two answers is meant: y2 or y1."""


class AnswerSettings(Settings):
    """How a policy answers."""

    temperature: float = Field(default=0.0, ge=0, le=2)
    """Sampling temperature of every answer; 0 is greedy."""
    max_response_tokens: int = Field(default=512, ge=1, le=16_384)
    """Longest first response and refinement."""
    max_principle_tokens: int = Field(default=64, ge=1, le=1024)
    """Longest principle."""
    votes: Annotated[int, Field(ge=1, le=64, exclude_if=lambda count: count == 1)] = 1
    """Principles that are sampled for each answer: it is refined under the one that more than half
    of them state, and without such a majority the first answer stands. 1: under the only one."""

    @model_validator(mode="after")
    def _votes_that_differ(self) -> Any:
        if self.votes > 1 and not self.temperature:
            raise ValueError("votes need a temperature above 0: greedily all of them are the same")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A policy's answer to a prompt, or the reason why there is none."""

    text: str
    missing: str | None = None


def given(row: Answer | None, which: Which) -> Given:
    """One of a row's two answers; it may be missing because the prompt left no room for it, or
    because a server refused."""
    if row is None:
        return Given(text="", missing="there is none")
    text = row.refined if which == "refined" else row.initial
    return Given(text=text, missing=None if text.strip() else NO_ANSWER.get(row.finish))


def noise_key(seed: int, prompt_id: str, role: str) -> str:
    """The key of the noise of a turn: "initial", "principle" or "refined"."""
    return f"{seed}/evaluate/{prompt_id}/{role}"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How a policy answers: everything but the policy and the prompts."""

    templates: Templates
    settings: AnswerSettings
    seed: int
    iteration: int
    weighs: bool = True
    """Whether a gated policy is asked how probable it is to keep y1; an endpoint cannot tell."""

    @property
    def completions(self) -> int:
        """Completions that one prompt takes: y1, each z (where there are principles), y2."""
        return 2 + self.settings.votes * self.templates.guided

    def ask(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        advance: Progress | None = None,
        temperature: float | None = None,
    ) -> list[Answer]:
        """y1, z ~ p(· | x, y1), y2 ~ p(· | x, y1, z) of every prompt, in order; gold is not read.

        Unguided templates have no z: y2 ~ p(· | x, y1). Where z keeps y1, or no z has a majority,
        y1 stands for y2, and nothing is asked. The noise depends on seed and prompt, not on the
        iteration: similar policies answer alike, which makes their comparison tight.

        Args:
            advance: called with the number of sampled completions.
            temperature: replaces that of the settings.
        """
        templates, settings = self.templates, self.settings

        def sample(
            role: str, asked: Mapping[int, Messages], max_tokens: int, n: int = 1
        ) -> dict[int, Completion]:
            requests = [
                Request(
                    messages=messages,
                    key=noise_key(self.seed, prompts[i].prompt_id, role),
                    n=n,
                    temperature=settings.temperature if temperature is None else temperature,
                    max_tokens=max_tokens,
                )
                for i, messages in asked.items()
            ]
            found = policy.generate(requests, advance)
            return {i: vote(completions) for i, completions in zip(asked, found, strict=True)}

        x = dict(enumerate(p.prompt for p in prompts))
        y1 = sample("initial", x, settings.max_response_tokens)
        asked, z = dict[int, Messages](), dict.fromkeys(x, no_answer("stop"))
        if templates.guided:
            asked = {i: ask.ask(templates, x[i], y1[i].text) for i in x}
            z = sample("principle", asked, settings.max_principle_tokens, settings.votes)
        named = {i: asked[i] for i in asked if z[i].finish not in NO_ANSWER}
        kept = [i for i in named if templates.keeps(z[i].text)]
        turns = {
            i: ask.ask_refinement(templates, x[i], y1[i].text, z[i].text)
            for i in x
            if i not in set(kept)
        }
        y2 = sample("refined", turns, settings.max_response_tokens)
        y2 |= {i: replace(y1[i], tokens=0) for i in kept}
        if advance and kept:
            advance(len(kept))
        keep = self._keep(policy, named) if templates.gated and self.weighs else {}
        return [
            _answer(prompt, self.iteration, (y1[i], z[i], y2[i]), keep.get(i))
            for i, prompt in enumerate(prompts)
        ]

    def _keep(self, policy: Policy, asked: Mapping[int, Messages]) -> dict[int, float]:
        """p(keep | x, y1) of some prompts, by their place."""
        scored = policy.logprobs([(messages, self.templates.keep) for messages in asked.values()])
        return {i: math.exp(s.logprob) for i, s in zip(asked, scored, strict=True)}


def _answer(
    prompt: Prompt, iteration: int, parts: Sequence[Completion], keep: float | None
) -> Answer:
    initial, principle, refined = parts
    return Answer(
        prompt_id=prompt.prompt_id,
        iteration=iteration,
        initial=initial.text,
        initial_thoughts=initial.thoughts,
        principle=principle.text,
        principle_thoughts=principle.thoughts,
        refined=refined.text,
        refined_thoughts=refined.thoughts,
        finish=finish_of(parts),
        tokens=sum(part.tokens for part in parts),
        initial_tokens=initial.tokens,
        keep=keep,
    )


@dataclass(frozen=True, kw_only=True)
class Respondent:
    """A policy that answers in shards; a later attempt does not ask for finished shards again."""

    pool: Pool[Policy]
    generation: Generation
    work: Workspace

    def answers(self, name: str, prompts: Sequence[Prompt]) -> list[Answer]:
        """An answer to every prompt, in their order, kept as `<name>.parquet`."""
        return self.in_shards(name, Answer, prompts, self.generation.ask)

    def in_shards(
        self,
        name: str,
        row_type: type[Row],
        items: Sequence[Any],
        compute: Compute[Policy, Row],
        prompts_each: int = 1,
    ) -> list[Row]:
        """The rows of `compute` over shards of items; each item takes `prompts_each` prompts."""
        parts = self.work.in_shards(
            name,
            row_type,
            items,
            self.pool,
            compute,
            what=f"evaluate {self.generation.iteration}: {name}",
            unit="completions",
            each=self.generation.completions * prompts_each,
        )
        return list(self.work.table(parts))


def answer_metrics(answers: Sequence[Answer]) -> dict[str, float]:
    """Mean lengths in characters, shares in [0, 1], and tokens per prompt."""
    if not answers:
        return {}
    return {
        "answers/initial_characters": fmean(len(a.initial) for a in answers),
        "answers/refined_characters": fmean(len(a.refined) for a in answers),
        "answers/kept_initial": fmean(a.refined == a.initial for a in answers),
        "answers/empty": fmean(not a.refined.strip() for a in answers),
        "answers/truncated": fmean(a.finish != "stop" for a in answers),
        "answers/tokens": fmean(a.tokens for a in answers),
    }
