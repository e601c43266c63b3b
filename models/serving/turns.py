"""The turns of an answer: y1 alone; or y1, z and y2, as `tasks/policies/answers.py` has them; or
y1 where the policy's gate keeps it, else all three."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from models import prompts as ask
from models.policy import NO_ANSWER, Messages, Request, before
from models.prompts import Templates
from models.serving.batching import Batcher, CountedCompletion

Mode = Literal["first", "refine", "gated"]
"""What is answered: y1; or y2 after y1 and z; or y1 where p(keep | x, y1) reaches a threshold, else
y2."""
MODES: tuple[Mode, ...] = get_args(Mode)
Role = Literal["initial", "principle", "refined"]
"""Which turn it is."""
Key = Callable[[int, Messages, Role], str]
"""(seed, prompt, role) to the key of a request's noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a client asks for; `models.policy.Request` says what the numbers mean."""

    messages: Messages
    mode: Mode
    seed: int
    temperature: float
    top_p: float
    max_tokens: int
    """Of the first answer and of the refined one, each."""
    stop: tuple[str, ...]
    """Of the answer that the client gets, not of the turns before it."""
    threshold: float = 1.0
    """Mode gated: the least p(keep | x, y1) at which y1 is the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn(CountedCompletion):
    """One of the policy's turns."""

    role: Role
    last: bool
    """Whether it is the answer."""

    @property
    def missing(self) -> str | None:
        """Why it has no text (`Completion.finish`); None where it is answered."""
        finish = self.completion.finish
        return finish if finish in NO_ANSWER else None


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """How a policy comes to an answer: turn by turn, each in whichever batch comes next."""

    batcher: Batcher
    templates: Templates
    max_principle_tokens: int
    votes: int = 1
    """Principles that are sampled for each choice (`models.policy.vote`)."""
    key: Key

    async def turns(self, asked: Asked, choice: int = 0) -> AsyncGenerator[Turn, None]:
        """The turns of one choice, the last being the answer; a turn without text is the last.

        Choice 0 is what evaluation gives with the same seed. Cancelled, it drops what has not
        begun.

        Raises:
            Full: too many requests wait.
            UserError: the policy cannot answer.
        """
        templates, x, first = self.templates, asked.messages, asked.mode == "first"
        y1 = await self._turn(asked, choice, "initial", x, last=first)
        if not first and not y1.missing and await self._kept(asked, y1.completion.text):
            y1 = _as_answer(y1, asked.stop)
        yield y1
        if y1.last or y1.missing:
            return
        principle = ""
        if templates.guided:
            prompt = ask.ask(templates, x, y1.completion.text)
            z = await self._turn(asked, choice, "principle", prompt)
            yield z
            if z.missing:
                return
            principle = z.completion.text
            if templates.keeps(principle):
                answer = replace(y1, role="refined", prompt_tokens=0)  # y1 has been counted
                yield _as_answer(answer, asked.stop, tokens=0)
                return
        prompt = ask.ask_refinement(templates, x, y1.completion.text, principle)
        yield await self._turn(asked, choice, "refined", prompt, last=True)

    async def _kept(self, asked: Asked, initial: str) -> bool:
        """Whether the gate keeps a first answer."""
        if asked.mode != "gated":
            return False
        prompt = ask.ask(self.templates, asked.messages, initial)
        keep = await asyncio.wrap_future(self.batcher.probability(prompt, self.templates.keep))
        return keep >= asked.threshold

    async def _turn(
        self, asked: Asked, choice: int, role: Role, messages: Messages, last: bool = False
    ) -> Turn:
        short = role == "principle"
        key = self.key(asked.seed, asked.messages, role)
        request = Request(
            messages=messages,
            key=f"{key}/{choice}" if choice else key,
            n=self.votes if short else 1,
            temperature=asked.temperature,
            top_p=asked.top_p,
            max_tokens=self.max_principle_tokens if short else asked.max_tokens,
            stop=asked.stop if last else (),
        )
        found = await asyncio.wrap_future(self.batcher.submit(request))
        return Turn(
            role=role, completion=found.completion, prompt_tokens=found.prompt_tokens, last=last
        )


def _as_answer(turn: Turn, stop: tuple[str, ...], tokens: int | None = None) -> Turn:
    """A first answer as the one that the client gets, which ends before a stop text."""
    own = turn.completion
    text, counted = before(stop, own.text), own.tokens if tokens is None else tokens
    return replace(turn, last=True, completion=replace(own, text=text, tokens=counted))
