"""The turns of SAMI's stages: see `flows.plan.workload`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean

from constitutions.reference import load_pairs
from flows.methods import method_of
from flows.plan.workload import (
    CHARACTERS,
    MARKS,
    Assumed,
    JudgeTurns,
    Lengths,
    SampledTurn,
    Workload,
)
from flows.schema import ExperimentSettings
from models.templates import constitution_wording_of

PRINCIPLE = 80
"""Characters of a principle that is not written yet: a guess."""


def workload_of(settings: ExperimentSettings, known: Lengths, assumed: Assumed) -> Workload:
    """The turns of an experiment's stages, by its method."""
    kind = SamiWorkload if method_of(settings).constitutional else Workload
    return kind(settings, known, assumed)


@dataclass(frozen=True)
class SamiWorkload(Workload):
    """The turns of SAMI's stages. A query is trained on in one row for each of C constitutions."""

    rest = "write"

    @property
    def given(self) -> float:
        """Tokens of the constitution that a prompt holds."""
        return self._constitution(fmean) if self.assumed.given is None else self.assumed.given

    def _constitution(self, of: Callable[[Iterable[float]], float]) -> float:
        """The same, of the mean or the longest principles."""
        s = self.settings
        wording = constitution_wording_of(s.policy.templates)
        pairs = load_pairs(s.write.constitution).principles if s.write.constitution else ()
        texts = [text for p in pairs for text in (p.text, p.antithesis) if text]
        around = len(wording.item.format(number=1, principle="")) + len(wording.separator)
        each = around + (of(map(len, texts)) if texts else PRINCIPLE)
        return MARKS + (len(wording.given) + s.sample.principles * each) / CHARACTERS

    @property
    def accepted(self) -> float:
        """Of the queries; only those whose responses are all the same teach nothing."""
        return 1.0 if self.assumed.accepted is None else self.assumed.accepted

    @property
    def rows(self) -> int:
        """C: one for each constitution."""
        return self.settings.sample.constitutions

    @property
    def step_rows(self) -> int:
        """A query's."""
        return self.rows

    @property
    def arms(self) -> int:
        """Kinds of constitutions that held-out prompts are answered under."""
        return 4 if self.settings.write.held_out else 2

    def explored(self) -> tuple[str, list[SampledTurn]]:
        """What `sample` samples for a query: see `tasks.sami.sample`."""
        s = self.settings.sample
        under = self.prompt + self.given
        turn = SampledTurn(samples=s.constitutions, limit=s.max_response_tokens, own=under)
        return "sample", [turn]

    def answered(self) -> list[SampledTurn]:
        """What `evaluate` samples for a prompt: see `tasks.sami.evaluate`."""
        limit = self.settings.evaluate.max_response_tokens
        return [
            SampledTurn(samples=self.arms, limit=limit, own=self.prompt + self.given),
            SampledTurn(samples=1, limit=limit, shared=self.prompt),
        ]

    def informed(self) -> list[SampledTurn]:
        """What its estimate of the information samples, and then scores; not behind an endpoint."""
        if self.settings.policy.endpoint:
            return []
        size, limit = self.rows, self.settings.evaluate.max_response_tokens
        under, (y,) = self.prompt + self.given, self._expected(limit)
        return [
            SampledTurn(samples=size, limit=limit, own=under),
            SampledTurn(samples=size * size, limit=0, own=under + y),
        ]

    def learned(self) -> tuple[float, float]:
        """A row is a prompt under one constitution and every response to the query after it."""
        y = self.assumed.filled * self.settings.sample.max_response_tokens
        one, _ = self._cut(self.prompt + self.given + y, y)
        return one + (self.rows - 1) * y, self.rows * y

    def at_limits(self) -> Workload:
        """With the longest principles as well."""
        longest = super().at_limits()
        return replace(longest, assumed=replace(longest.assumed, given=self._constitution(max)))

    def judged(self, iteration: int) -> Iterator[JudgeTurns]:
        """Every kind of response is compared with the initial policy's and the previous one's;
        only the first judge reads responses without a constitution."""
        s, opponents = self.settings, len({0, max(iteration - 1, 0)} - {iteration})
        for number, judge in enumerate(s.evaluate.judges if opponents else ()):
            if judge.policy:
                turn = self._pairs(judge, opponents * (self.arms + (number == 0)))
                yield JudgeTurns(stage="judge", judge=judge, prompts=s.prompts.held_out, turn=turn)
