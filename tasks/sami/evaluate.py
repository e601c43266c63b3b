"""SAMI, evaluation: does the policy follow a constitution better than the initial policy did?

Held-out prompts are answered under constitutions of principles, of antitheses, of principles or
antitheses that no training constitution held, and under none. All policies get the same
constitutions; the judges compare a policy's answer with the initial policy's and the previous one's
under the same constitution. The mutual information is estimated on mixtures as in training.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, stdev
from typing import NamedTuple, TypeVar

from constitutions.constitution import Principle
from constitutions.errors import UserError
from models.judges.base import numbered
from models.policy import NO_ANSWER, Messages, Policy, Progress, Request, Scoring
from models.prompts import ConstitutionWording, under_constitution
from models.worlds.base import Oracle
from tasks.evaluate import EvaluateSettings, check_judges, noted_judges, panel_of
from tasks.judging.pairs import AnswerPair
from tasks.judging.panel import Panel
from tasks.judging.rates import (
    agreement_metrics,
    length_metrics,
    order_metrics,
    win_rate_metrics,
    win_rates,
)
from tasks.judging.truth import obedience_metrics, world_of
from tasks.policies.answers import Given
from tasks.policies.opening import PolicySource
from tasks.record.record import Attempt
from tasks.record.slot import Slot
from tasks.record.stage import stage
from tasks.record.work import Metrics, Workspace
from tasks.rows import Comparison, Draw, Prompt, Response, Sampled, fields
from tasks.sami.draw import DrawnConstitution, PrinciplePool, mixed, pool_of
from tasks.sami.sample import SampleSettings, check_mixtures, drawn_response, sample
from tasks.score import ScoreSettings

Row = TypeVar("Row")
ARMS = ("principles", "antitheses", "held_out_principles", "held_out_antitheses", "plain")
"""The kinds of constitutions; "plain" has none. A pool without antitheses, or without principles
that were held out, lacks those arms."""
CONDITIONED = ARMS[:2]
"""Together they give the rate "constitution": ½ for a policy that ignores its constitution."""
APART = ARMS[2:4]
"""Together they give the rate "held_out"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """log C − loss of one held-out prompt's constitutions and responses, in nats."""

    prompt_id: str
    per_token: float | None
    """With the mean log-probability per token, as in training; the end of the turn counts."""
    whole: float | None
    """With that of the whole response: the bound that log-probabilities themselves give. Both None
    where a response is missing."""


class HeldOutQuery(NamedTuple):
    """A held-out prompt, and the constitution that it is answered under."""

    prompt: Prompt
    arm: str
    constitution: DrawnConstitution


@stage("evaluate")
def evaluate_stage(
    at: Slot,
    settings: EvaluateSettings,
    scoring: ScoreSettings,
    sampling: SampleSettings,
    policy: PolicySource,
    held_out: Attempt,
    written: Attempt,
    *,
    initial: Attempt | None = None,
    previous: Attempt | None = None,
    champion: Attempt | None = None,
) -> Attempt:
    """held-out prompts, the pool, earlier policies' responses → responses, comparisons, metrics.

    `sampling` says how many principles a constitution holds, and what the estimate's mixtures are;
    `champion` is the best policy before, where it is neither the initial nor the previous one.

    Raises:
        UserError: a judge is wrong (before anything is answered), or failed too often.
    """
    given = {"initial": initial, "previous": previous, "champion": champion}
    references = {name: attempt for name, attempt in given.items() if attempt is not None}

    def compute(work: Workspace) -> Metrics:
        prompts = held_out.read("prompts", Prompt)
        world = world_of(prompts)
        oracle = world.oracle if world else None
        check_followed(settings, scoring, oracle)
        pool = pool_of(written)
        check_mixtures(sampling, pool.trained)
        asked = asks(prompts, pool, sampling.principles, at.seed)
        respond = partial(_respond, settings, policy.wording, at.seed, at.iteration)
        estimate = partial(
            _estimate,
            _on_policy(sampling, settings),
            policy.wording,
            pool.trained,
            f"{at.seed}/information",
        )
        showing = f"evaluate {at.iteration}: "
        with policy.pool() as engines:
            name = "responses"
            parts = work.in_shards(
                name, Response, asked, engines, respond, what=showing + name, unit=name
            )
            responses = list(work.table(parts))
            metrics = response_metrics(responses, len(prompts))
            if not policy.settings.endpoint:  # which gives no log-probabilities
                name = "information"
                estimates = work.in_shards(
                    name, Estimate, prompts, engines, estimate, what=showing + name, unit=name
                )
                metrics |= mi_metrics(list(work.table(estimates)))

        with panel_of(settings, scoring, at, work, oracle) as panel:
            metrics |= _compared(panel, settings, responses, references, prompts)
        if world and oracle:
            metrics |= obedience_metrics(world.name, oracle, responses, prompts)
        return metrics

    where = noted_judges(policy.noted(at), _about_constitutions(settings), scoring)
    mixtures = sampling.model_dump_json(include={"constitutions", "principles"})
    where = where.using("models.training.sami", sampling=mixtures)
    inputs = policy.inputs(held_out=held_out, written=written, **references)
    return where.attempt("evaluate", settings, inputs, compute)


def check_followed(
    settings: EvaluateSettings, scoring: ScoreSettings, oracle: Oracle | None
) -> None:
    """Refuse judges that cannot say how a constitution is followed, before anything is answered.

    Raises:
        UserError: the oracle is asked for and there is none; a judge reads no constitution.
    """
    check_judges(settings, scoring, oracle)
    for judge in settings.judges:
        asked, kind = judge.judge_type, judge.on(oracle)
        if not (kind.reads_principle or asked.needs_gold):
            raise UserError(
                "this judge reads no constitution",
                where=f"setting 'evaluate.judge.kind' = {judge.kind}",
                expected="pairwise or absolute, with a model that judges; or similarity, to see "
                "how near to the golds the answers stay",
                fix="--set evaluate.judge.kind=pairwise --set evaluate.judge.policy.model=…",
            )


# Answering ----------------------------------------------------------------------------------


def asks(
    prompts: Sequence[Prompt], pool: PrinciplePool, size: int, seed: int
) -> list[HeldOutQuery]:
    """Every prompt under a constitution of each kind that the pool has, the same for every policy.

    Args:
        size: how many principles a constitution holds; all where there are fewer.
    """
    return [
        HeldOutQuery(prompt, arm, constitution)
        for prompt in prompts
        for arm, constitution in _constitutions(pool, size, f"{seed}/{prompt.prompt_id}")
    ]


def _constitutions(
    pool: PrinciplePool, size: int, key: str
) -> Iterator[tuple[str, DrawnConstitution]]:
    sides = {"": pool.trained, "held_out_": pool.held_out}
    for prefix, principles in sides.items():
        for kind, wanted in (("principles", True), ("antitheses", False)):
            there = [p for p in principles if wanted or p.antithesis]
            if there:
                rng = random.Random(f"{key}/{prefix}{kind}")
                chosen = rng.sample(there, min(size, len(there)))
                yield f"{prefix}{kind}", mixed(chosen, [wanted] * len(chosen), rng)
    yield "plain", DrawnConstitution((), ())


def _respond(
    settings: EvaluateSettings,
    wording: ConstitutionWording,
    seed: int,
    iteration: int,
    policy: Policy,
    asked: Sequence[HeldOutQuery],
    advance: Progress,
) -> list[Response]:
    """The noise depends on seed, prompt and arm, not on the iteration: similar policies answer
    alike, which makes their comparison precise."""
    requests = [
        Request(
            messages=_messages(ask, wording),
            key=f"{seed}/evaluate/{ask.prompt.prompt_id}/{ask.arm}",
            temperature=settings.temperature,
            max_tokens=settings.max_response_tokens,
        )
        for ask in asked
    ]
    return [
        Response(
            prompt_id=ask.prompt.prompt_id,
            iteration=iteration,
            arm=ask.arm,
            **fields(drawn_response(ask.constitution, response)),
        )
        for ask, (response, *_) in zip(asked, policy.generate(requests, advance), strict=True)
    ]


def _messages(ask: HeldOutQuery, wording: ConstitutionWording) -> Messages:
    if not ask.constitution.principles:
        return ask.prompt.prompt
    return under_constitution(wording, ask.constitution.principles, ask.prompt.prompt)


def response_metrics(responses: Sequence[Response], prompts: int) -> Metrics:
    """Lengths in characters of each arm's responses; shares in [0, 1]; tokens a prompt."""
    lengths = {
        f"answers/{arm}_characters": fmean(len(r.response) for r in rows)
        for arm, rows in _by_arm(responses).items()
    }
    return lengths | {
        "answers/empty": fmean(not r.response.strip() for r in responses),
        "answers/truncated": fmean(r.finish == "length" for r in responses),
        "answers/tokens": sum(r.tokens for r in responses) / prompts,
    }


def _by_arm(responses: Iterable[Response]) -> dict[str, list[Response]]:
    arms: dict[str, list[Response]] = {}
    for row in responses:
        arms.setdefault(row.arm, []).append(row)
    return arms


# The mutual information -----------------------------------------------------------------------


def _on_policy(sampling: SampleSettings, settings: EvaluateSettings) -> SampleSettings:
    """Mixtures as in training; responses sampled at temperature 1, on-policy."""
    on_policy = {"temperature": 1.0, "top_p": 1.0}
    return sampling.model_copy(
        update={**on_policy, "max_response_tokens": settings.max_response_tokens}
    )


def mi_metrics(estimates: Sequence[Estimate]) -> Metrics:
    """Means over the prompts, in nats, and the standard error of that per token: `mi/…`."""
    tokens = [row.per_token for row in estimates if row.per_token is not None]
    metrics = {"mi/failed": float(len(estimates) - len(tokens))}
    if len(tokens) > 1:
        metrics["mi/per_token"] = fmean(tokens)
        metrics["mi/per_token_error"] = stdev(tokens) / math.sqrt(len(tokens))
        metrics["mi/whole"] = fmean(row.whole for row in estimates if row.whole is not None)
    return metrics


def _estimate(
    settings: SampleSettings,
    wording: ConstitutionWording,
    principles: Sequence[Principle],
    key: str,
    policy: Policy,
    prompts: Sequence[Prompt],
    advance: Progress,
) -> list[Estimate]:
    """Samples responses under mixtures; how much more probable is each under its own constitution?

    Every response is read under each of its prompt's C constitutions: C × C log-probabilities.
    """
    sampled = sample(settings, wording, principles, key, policy, prompts)
    pairs = [
        (under_constitution(wording, given.principles, row.prompt), own.response)
        for row in sampled
        for given in row.draws
        for own in row.draws
    ]
    scored = iter(policy.logprobs(pairs))
    found = []
    for row in sampled:
        size = len(row.draws)
        cells = [[next(scored) for _ in range(size)] for _ in range(size)]
        found.append(_estimate_of(row, cells))
        advance(1)
    return found


def _estimate_of(row: Sampled, cells: Sequence[Sequence[Scoring]]) -> Estimate:
    if any(draw.finish in NO_ANSWER or _unfinished(draw) for draw in row.draws):
        return Estimate(prompt_id=row.prompt_id, per_token=None, whole=None)
    return Estimate(
        prompt_id=row.prompt_id,
        per_token=bound([[cell.logprob / cell.tokens for cell in line] for line in cells]),
        whole=bound([[cell.logprob for cell in line] for line in cells]),
    )


def _unfinished(draw: Draw) -> bool:
    """Whether its thoughts were cut off before a response began."""
    return bool(draw.thoughts) and not draw.response


def bound(matrix: Sequence[Sequence[float]]) -> float:
    """log C − loss of a (constitutions, responses) matrix of log-probabilities, in nats, at most
    log C: `models.training.sami`."""
    import torch

    from models.training.sami import information

    return information(torch.tensor(matrix, dtype=torch.float64))


# Judging ------------------------------------------------------------------------------------


def response_pairs(
    responses: Sequence[Response], references: Sequence[Response], prompts: Iterable[Prompt]
) -> list[AnswerPair]:
    """Pair one policy's responses with another's to the same prompt and constitution.

    Raises:
        UserError: the reference answered under another constitution.
    """
    asked = {p.prompt_id: p for p in prompts}
    theirs = {(r.prompt_id, r.arm): r for r in references}
    pairs = []
    for ours in responses:
        other = theirs.get((ours.prompt_id, ours.arm))
        if other is not None and other.principles != ours.principles:
            raise UserError(
                "the reference policy answered under other constitutions",
                where=f"evaluate of iteration {other.iteration}",
                fix="run that stage again: staple run EXPERIMENT --resume",
            )
        pairs.append(
            AnswerPair(
                iteration=ours.iteration,
                answer=ours.arm,
                against=references[0].iteration,
                reference=ours.arm,
                prompt=asked[ours.prompt_id],
                ours=_given(ours),
                theirs=_given(other),
                principle=numbered(ours.principles) if ours.principles else "",
            )
        )
    return pairs


def _given(row: Response | None) -> Given:
    """A response, or why there is none, such as a prompt that is too long."""
    if row is None:
        return Given(text="", missing="there is none")
    return Given(text=row.response, missing=NO_ANSWER.get(row.finish))


def _about_constitutions(settings: EvaluateSettings) -> EvaluateSettings:
    """LLM judges are shown the constitution, and asked how it is followed."""
    judges = [judge.about_principles() for judge in settings.judges]
    return settings.model_copy(update={"judge": judges[0], "also": tuple(judges[1:])})


def _compared(
    panel: Panel,
    settings: EvaluateSettings,
    responses: Sequence[Response],
    references: Mapping[str, Attempt],
    prompts: Sequence[Prompt],
) -> Metrics:
    """Win rates under the constitutions, also at equal lengths; and of the plain responses."""
    pairs = [
        pair
        for reference in _references(references)
        for pair in response_pairs(responses, reference, prompts)
    ]
    if not pairs:
        return {}
    conditioned, plain = [p for p in pairs if p.principle], [p for p in pairs if not p.principle]
    judges = _about_constitutions(settings).judges
    rows, *others = panel.compare("comparisons", conditioned, judges)
    (unconditioned,) = panel.compare("plain-comparisons", plain, settings.judges[:1])
    counted = [*rows, *together(rows, "constitution", CONDITIONED), *unconditioned]
    counted += together(rows, "held_out", APART)
    how = {"seed": panel.seed, "resamples": panel.resamples}
    return {
        **win_rate_metrics(win_rates(counted, max_failed=panel.max_failed, **how)),
        **length_metrics(counted, seed=panel.seed),
        **order_metrics("judge", rows),
        **agreement_metrics(rows, [row for part in others for row in part]),
    }


def _references(earlier: Mapping[str, Attempt]) -> list[list[Response]]:
    """The responses of the policies before, each once."""
    once = {a.run_id: a for a in earlier.values()}  # one at iteration 1
    return [attempt.read("responses", Response) for attempt in once.values()]


def together(rows: Iterable[Comparison], name: str, arms: Sequence[str]) -> list[Comparison]:
    """A prompt's comparisons of several arms as one, with their mean outcome.

    The bootstrap resamples prompts, so each must count once. Where one comparison failed, the joint
    one has no outcome either.
    """
    groups: dict[tuple[str, int], list[Comparison]] = {}
    for row in rows:
        if row.answer in arms:
            groups.setdefault((row.prompt_id, row.against), []).append(row)
    return [_mean(group, name) for group in groups.values()]


def _mean(rows: Sequence[Comparison], name: str) -> Comparison:
    outcomes = [row.outcome for row in rows]
    known = [outcome for outcome in outcomes if outcome is not None]
    return replace(
        rows[0],
        answer=name,
        reference=name,
        ours="\n\n".join(row.ours for row in rows),
        theirs="\n\n".join(row.theirs for row in rows),
        our_score=None,
        their_score=None,
        outcome=fmean(known) if len(known) == len(outcomes) else None,
        failure=next((row.failure for row in rows if row.failure), None),
        verdicts=(),
    )
