"""SAMI, sampling: for each query C constitutions, and one response of the policy under each.

y_i ~ p_θ(· | x, c_i) (arXiv 2404.14313, section 3). No response is called the better one: `train`
learns only from which constitution each response was sampled under.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from itertools import islice
from statistics import fmean

from pydantic import Field, model_validator

from constitutions.constitution import Principle
from models.policy import Completion, Policy, Progress, Request
from models.prompts import ConstitutionWording, under_constitution
from models.settings import Settings
from tasks.policies.opening import PolicySource
from tasks.record.record import Attempt
from tasks.record.slot import Slot
from tasks.record.stage import stage
from tasks.record.work import Metrics, Workspace
from tasks.rows import Draw, Prompt, Sampled, fields
from tasks.sami.draw import DrawnConstitution, draw, pool_of


class SampleSettings(Settings):
    """SAMI: which constitutions a query is asked under, and how the responses are sampled."""

    constitutions: int = Field(2, ge=2, le=64)
    """C: constitutions a query, and responses. Each step compares C × C pairs."""
    principles: int = Field(2, ge=1, le=32)
    """How many principles, as such or as their antitheses, a constitution holds."""
    temperature: float = Field(1.0, ge=0, le=2)
    """Sampling temperature; on-policy is 1, the paper's is 0."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; 1 samples from the whole distribution."""
    max_response_tokens: int = Field(512, ge=1, le=16_384)
    """Longest response."""

    @model_validator(mode="after")
    def _enough_mixtures(self) -> SampleSettings:
        if self.constitutions > 2**self.principles:
            raise ValueError(
                f"{self.constitutions} constitutions need more than {self.principles} principles "
                "each to differ: raise principles"
            )
        return self


@stage("sample")
def sample_stage(
    at: Slot, settings: SampleSettings, policy: PolicySource, prompts: Attempt, written: Attempt
) -> Attempt:
    """prompts, the pool of principles → sampled, shard by shard.

    Raises:
        UserError: the pool has no C different constitutions, or the policy cannot be loaded.
    """

    def compute(work: Workspace) -> Metrics:
        key, principles = f"{at.seed}/{at.iteration}", pool_of(written).trained
        with work.device(), policy.pool() as pool:
            parts = work.in_shards(
                "sampled",
                Sampled,
                prompts.rows("prompts", Prompt),
                pool,
                partial(sample, settings, policy.wording, principles, key),
                what=f"sample {at.iteration}",
                unit="responses",
                each=settings.constitutions,
            )
        return _metrics(list(work.table(parts)))

    inputs = policy.inputs(prompts=prompts, written=written)
    return policy.noted(at).attempt("sample", settings, inputs, compute, takes_device=True)


def sample(
    settings: SampleSettings,
    wording: ConstitutionWording,
    pool: Sequence[Principle],
    key: str,
    policy: Policy,
    rows: Sequence[Prompt],
    advance: Progress | None = None,
) -> list[Sampled]:
    """C constitutions, and a response under each, for every prompt, in the order of the rows.

    Args:
        pool: the principles to draw from.
        key: "<seed>/<iteration>"; with prompt_id it seeds the draw and the noise.
        advance: called with the number of responses that were sampled, C a prompt.

    Raises:
        UserError: the pool has no C different constitutions.
    """
    drawn = [
        draw(
            pool,
            constitutions=settings.constitutions,
            principles=settings.principles,
            rng=random.Random(f"{key}/{row.prompt_id}/constitutions"),
        )
        for row in rows
    ]
    requests = [
        Request(
            messages=under_constitution(wording, constitution.principles, row.prompt),
            key=f"{key}/{row.prompt_id}/response/{number}",
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_response_tokens,
        )
        for row, constitutions in zip(rows, drawn, strict=True)
        for number, constitution in enumerate(constitutions)
    ]
    responses = iter([some[0] for some in policy.generate(requests, advance)])
    return [
        Sampled(
            **fields(row),
            draws=tuple(map(drawn_response, constitutions, islice(responses, len(constitutions)))),
        )
        for row, constitutions in zip(rows, drawn, strict=True)
    ]


def check_mixtures(settings: SampleSettings, pool: Sequence[Principle]) -> None:
    """Refuse a pool that has no C different constitutions.

    Raises:
        UserError: too few principles, or too few with an antithesis.
    """
    size, each = settings.constitutions, settings.principles
    draw(pool, constitutions=size, principles=each, rng=random.Random(0))


def drawn_response(constitution: DrawnConstitution, response: Completion) -> Draw:
    """The row of a constitution and the response under it."""
    return Draw(
        identifiers=constitution.identifiers,
        principles=constitution.principles,
        response=response.text,
        finish=response.finish,
        tokens=response.tokens,
        thoughts=response.thoughts,
    )


def _metrics(sampled: Sequence[Sampled]) -> Metrics:
    draws = [draw for row in sampled for draw in row.draws]
    return {
        "sampled_responses": float(len(draws)),
        "generated_tokens": float(sum(draw.tokens for draw in draws)),
        "sample/truncated": fmean(draw.finish == "length" for draw in draws),
        "sample/silent": fmean(not draw.response.strip() for draw in draws),
        "sample/characters": fmean(len(draw.response) for draw in draws),
        "sample/distinct": fmean(
            len({draw.response for draw in row.draws}) / len(row.draws) for row in sampled
        ),
    }
