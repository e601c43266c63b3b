"""Evaluation: what did an iteration gain, on prompts that no iteration has mined?

`answer` lets a policy answer the held-out prompts without any gold response; `compare` meets its
answers with those of an earlier policy; the `…_metrics` functions turn rows into the flat figures
that MLflow charts. The flows call them in that order.

A figure that is undefined (nothing was kept, so nothing can be faithful) is left out: never NaN,
never 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Literal, NamedTuple

from pydantic import Field

from constitutions.constitution import load
from constitutions.errors import UserError
from models import prompts as ask
from models.judges import (
    GoldSimilarity,
    Judge,
    Judgement,
    Pair,
    PlantedOracle,
    PrincipleJudge,
    choose_judge,
)
from models.policy import Completion, Message, Policy, Progress, Request
from models.prompts import Templates
from models.settings import Settings
from tasks.policies import PolicySource
from tasks.progress import progress
from tasks.records import Answer, Comparison, Labelled, Prompt, Scored
from tasks.score import ScoreSettings, load_similarity
from tasks.stage import stage
from tasks.store import Attempt, Slot
from tasks.winrate import NoOutcomeError, WinRate, win_rate
from tasks.work import Metrics, Workspace, shards


class EvaluateSettings(Settings):
    """How the held-out prompts are answered and judged."""

    temperature: float = Field(default=0.0, ge=0, le=2)
    """Sampling temperature of every answer; 0 is greedy."""
    max_response_tokens: int = Field(default=512, ge=1, le=16_384)
    """Longest first response and refinement."""
    max_principle_tokens: int = Field(default=64, ge=1, le=1024)
    """Longest principle."""
    judge: Literal["auto", "similarity", "oracle"] = "auto"
    """Who compares answers: "similarity" to the gold response, or the planted world's "oracle".
    "auto" is the oracle on the planted world and similarity elsewhere."""
    resamples: int = Field(default=10_000, ge=100, le=1_000_000)
    """Bootstrap resamples of a win rate's interval."""
    shard_size: int = Field(default=64, ge=1, le=4096)
    """Prompts answered and saved together: what a killed run repeats at most."""


class Arm(NamedTuple):
    """Which of our answers meets which of the reference policy's."""

    answer: str
    reference: str


REFINED = Arm("refined", "refined")
INITIAL = Arm("initial", "initial")
IMPROVED = Arm("refined", "initial")


def requests_each(templates: Templates) -> int:
    """Requests that one prompt takes: y1, z (where there are principles), y2."""
    return 3 if templates.guided else 2


@stage("evaluate")
def evaluate_stage(
    at: Slot,
    settings: EvaluateSettings,
    scoring: ScoreSettings,
    policy: PolicySource,
    held_out: Attempt,
    *,
    initial: Attempt | None = None,
    previous: Attempt | None = None,
    scored: Attempt | None = None,
    labelled: Attempt | None = None,
) -> Attempt:
    """held-out prompts, earlier policies' answers → answers, comparisons, metrics.

    `scoring` is the similarity of the judge "similarity". Iteration 0 has nothing earlier: its
    refined answers are compared with its own first ones.
    """
    given = {"initial": initial, "previous": previous, "scored": scored, "labelled": labelled}
    inputs = {name: attempt for name, attempt in given.items() if attempt is not None}

    def compute(work: Workspace) -> Metrics:
        prompts = held_out.read("prompts", Prompt)
        answers = _answers(work, prompts, policy, settings, at)
        planted = all(p.source.startswith("planted/") for p in prompts)
        judge = _judge(settings, scoring, planted)
        earlier = {a.run_id: a for a in (initial, previous) if a}  # one at iteration 1
        references = [answers, *(a.read("answers", Answer) for a in earlier.values())]
        compared = [row for r in references for row in compare(answers, r, prompts, judge)]
        work.write("comparisons", compared, Comparison)
        seed, resamples = at.seed, settings.resamples
        metrics = answer_metrics(answers)
        metrics |= win_rate_metrics(win_rates(compared, seed=seed, resamples=resamples))
        metrics |= source_metrics(compared, prompts, seed=seed, resamples=resamples)
        if planted and scored and labelled:
            metrics |= _truth(prompts, answers, scored, labelled)
        return metrics

    noted = policy.noted(at)
    noted = replace(noted, notes={**noted.notes, "scoring": scoring.model_dump_json()})
    return noted.attempt("evaluate", settings, policy.inputs(held_out=held_out, **inputs), compute)


def _answers(
    work: Workspace,
    prompts: Sequence[Prompt],
    policy: PolicySource,
    settings: EvaluateSettings,
    at: Slot,
) -> list[Answer]:
    engine = policy.load()
    each = requests_each(policy.templates)
    total = each * len(prompts)
    with progress(f"evaluate {at.iteration}", total, "requests") as tick:
        return work.sharded(
            "answers",
            Answer,
            shards(prompts, settings.shard_size),
            lambda shard: answer(
                shard,
                engine,
                settings,
                policy.templates,
                seed=at.seed,
                iteration=at.iteration,
                advance=tick,
            ),
            found=lambda shard: tick(each * len(shard)),
        )


def _judge(settings: EvaluateSettings, scoring: ScoreSettings, planted: bool) -> Judge:
    similarity = GoldSimilarity(load_similarity(scoring), scoring.similarity)
    return choose_judge(settings.judge, planted=planted, similarity=similarity)


def _truth(
    prompts: Sequence[Prompt], answers: Sequence[Answer], scored: Attempt, labelled: Attempt
) -> Metrics:
    """What the planted world's oracle can measure."""
    rows = labelled.read("labelled", Labelled)
    return faithfulness_metrics(PlantedOracle(), labelled=rows, answers=answers) | planted_metrics(
        scored=scored.read("scored", Scored),
        labelled=rows,
        principles=load(labelled.path("constitution.yaml")).texts,
        prompts=prompts,
        answers=answers,
    )


def answer(
    prompts: Sequence[Prompt],
    policy: Policy,
    settings: EvaluateSettings,
    templates: Templates,
    *,
    seed: int,
    iteration: int,
    advance: Progress | None = None,
) -> list[Answer]:
    """y1, z ~ p(· | x, y1), y2 ~ p(· | x, y1, z) for every prompt, in its order; gold is not read.

    Unguided templates have no z: y2 ~ p(· | x, y1).

    The noise is keyed by seed and prompt, not by iteration: policies that differ little answer
    alike, which makes their comparison tight. `advance` is called with the number of requests
    that were answered, `requests_each` a prompt.
    """

    def sample(role: str, messages: Iterable[ask.Messages], max_tokens: int) -> list[Completion]:
        requests = [
            Request(
                messages=m,
                key=f"{seed}/evaluate/{p.prompt_id}/{role}",
                temperature=settings.temperature,
                max_tokens=max_tokens,
            )
            for p, m in zip(prompts, messages, strict=True)
        ]
        return [completions[0] for completions in policy.generate(requests, advance)]

    y1 = sample("initial", (p.prompt for p in prompts), settings.max_response_tokens)
    z = [Completion(text="", tokens=0, logprob=0.0, finish="stop")] * len(prompts)
    if templates.guided:
        asked = (ask.ask(templates, p.prompt, a.text) for p, a in zip(prompts, y1, strict=True))
        z = sample("principle", asked, settings.max_principle_tokens)
    told = (
        ask.ask_refinement(templates, p.prompt, a.text, b.text)
        for p, a, b in zip(prompts, y1, z, strict=True)
    )
    y2 = sample("refined", told, settings.max_response_tokens)
    return [_answer(p, iteration, parts) for p, *parts in zip(prompts, y1, z, y2, strict=True)]


def _answer(prompt: Prompt, iteration: int, parts: Sequence[Completion]) -> Answer:
    initial, principle, refined = (part.text for part in parts)
    finishes = {part.finish for part in parts}
    return Answer(
        prompt_id=prompt.prompt_id,
        iteration=iteration,
        initial=initial,
        principle=principle,
        refined=refined,
        finish=next((f for f in ("overflow", "length") if f in finishes), "stop"),
        tokens=sum(part.tokens for part in parts),
    )


def compare(
    answers: Sequence[Answer],
    references: Sequence[Answer],
    prompts: Sequence[Prompt],
    judge: Judge,
    advance: Progress | None = None,
) -> list[Comparison]:
    """Judge one policy's answers against another's, joined by prompt: a row for every prompt.

    Like meets like: refined against refined, and the plain first answer against the plain first
    answer. Iteration 0's plain answer is also the yardstick of the refined answer (the paper's
    "initial policy"), and so is a policy's own first answer when it is its own reference.

    A missing answer or a failed judgement is a row without an outcome. An empty answer loses
    against any other, unjudged: to leave it out would flatter a policy that falls silent.

    Raises:
        ValueError: when either side is empty, mixes iterations or answers a prompt twice.
    """
    iteration, ours = _by_prompt(answers)
    against, theirs = _by_prompt(references)
    meetings = [
        _Meeting(p, arm, _given(ours, p, arm.answer), _given(theirs, p, arm.reference))
        for arm in _arms(iteration, against)
        for p in prompts
    ]
    verdicts = _verdicts(meetings, judge, advance)
    return [
        Comparison(
            prompt_id=m.prompt.prompt_id,
            iteration=iteration,
            answer=m.arm.answer,
            against=against,
            reference=m.arm.reference,
            judge=judge.name,
            ours=m.ours.text,
            theirs=m.theirs.text,
            our_score=verdict.our_score,
            their_score=verdict.their_score,
            outcome=verdict.outcome,
            failure=verdict.failure,
        )
        for m, verdict in zip(meetings, verdicts, strict=True)
    ]


class _Given(NamedTuple):
    """A policy's answer to a prompt, or the reason why there is none."""

    text: str
    missing: str | None = None


class _Meeting(NamedTuple):
    """Two answers to one prompt."""

    prompt: Prompt
    arm: Arm
    ours: _Given
    theirs: _Given


def _by_prompt(answers: Sequence[Answer]) -> tuple[int, dict[str, Answer]]:
    rows = {a.prompt_id: a for a in answers}
    iterations = {a.iteration for a in answers}
    if len(iterations) != 1 or len(rows) != len(answers):
        raise ValueError(
            "expected one answer a prompt, all of one iteration; found "
            f"{len(answers)} answers to {len(rows)} prompts, iterations {sorted(iterations)}"
        )
    return iterations.pop(), rows


def _given(answers: Mapping[str, Answer], prompt: Prompt, which: str) -> _Given:
    row = answers.get(prompt.prompt_id)
    if row is None:
        return _Given("", "there is none")
    text = str(getattr(row, which))
    silenced = row.finish == "overflow" and not text.strip()
    return _Given(text, "the prompt left no room for it" if silenced else None)


def _arms(iteration: int, against: int) -> tuple[Arm, ...]:
    if iteration == against:
        return (IMPROVED,)
    return (REFINED, INITIAL, IMPROVED) if against == 0 else (REFINED, INITIAL)


def _verdicts(
    meetings: Sequence[_Meeting], judge: Judge, advance: Progress | None
) -> list[Judgement]:
    known = [_without_judge(m) for m in meetings]
    open_ = [m for m, verdict in zip(meetings, known, strict=True) if verdict is None]
    pairs = [
        Pair(prompt=m.prompt.prompt, gold=m.prompt.gold, ours=m.ours.text, theirs=m.theirs.text)
        for m in open_
    ]
    judged = judge.compare(pairs, advance)
    if len(judged) != len(pairs):
        raise ValueError(f"the judge gave {len(judged)} judgements on {len(pairs)} pairs")
    remaining = iter(judged)
    return [verdict or next(remaining) for verdict in known]


def _without_judge(meeting: _Meeting) -> Judgement | None:
    """The verdict that needs no judge: an answer is missing, or one is empty."""
    for whose, given in (("our", meeting.ours), ("their", meeting.theirs)):
        if given.missing:
            return Judgement(outcome=None, failure=f"{whose} answer: {given.missing}")
    ours, theirs = bool(meeting.ours.text.strip()), bool(meeting.theirs.text.strip())
    return None if ours and theirs else Judgement(outcome=(1 + ours - theirs) / 2)


def win_rates(
    comparisons: Iterable[Comparison], *, seed: int, resamples: int = 10_000
) -> dict[str, WinRate]:
    """The win rate of every kind of comparison, by name.

    The names: "refined_vs_0", "refined_vs_previous", "initial_vs_0", "initial_vs_previous" (like
    against like), "refined_vs_initial_0" and "refined_vs_own_initial". At iteration 1 the previous
    policy is iteration 0, and both names are given.

    Raises:
        UserError: when every judgement of one kind failed, with the commonest reason.
    """
    kinds: dict[str, list[Comparison]] = {}
    for row in comparisons:
        for name in _names(row):
            kinds.setdefault(name, []).append(row)
    return {name: _win_rate(name, rows, seed, resamples) for name, rows in kinds.items()}


def _names(row: Comparison) -> list[str]:
    first, own, previous = row.against == 0, row.against == row.iteration, row.iteration - 1
    if row.answer != row.reference:
        names = {"refined_vs_initial_0": first, "refined_vs_own_initial": own}
    else:
        names = {
            f"{row.answer}_vs_0": first,
            f"{row.answer}_vs_previous": row.against == previous,
        }
    return [name for name, fits in names.items() if fits] or [f"{row.answer}_vs_{row.against}"]


def _win_rate(name: str, rows: Sequence[Comparison], seed: int, resamples: int) -> WinRate:
    try:
        return win_rate([row.outcome for row in rows], seed=seed, resamples=resamples)
    except NoOutcomeError as error:
        (reason, count), *_ = Counter(row.failure for row in rows).most_common(1)
        raise UserError(
            f"all {len(rows)} judgements failed; {count} of them: {reason}",
            where=f"win rate {name}, judge {rows[0].judge}",
            expected="a judge that can grade these prompts",
        ) from error


def win_rate_metrics(rates: Mapping[str, WinRate]) -> dict[str, float]:
    """Each rate in [0, 1] with its interval, p-value and failed judgements, as flat figures."""
    figures: dict[str, float] = {}
    for name, rate in rates.items():
        figures |= _interval(f"win_rate/{name}", rate)
        figures[f"win_rate/{name}_p"] = rate.p_value
        figures[f"win_rate/{name}_failed"] = float(rate.failed)
    return figures


def source_metrics(
    comparisons: Iterable[Comparison],
    prompts: Sequence[Prompt],
    *,
    seed: int,
    resamples: int = 10_000,
) -> dict[str, float]:
    """Win rates against iteration 0 for each source of prompts, when there are several.

    A source is what stands before the row number in `Prompt.source`: a corpus of a mixture, or
    "planted/seen" and "planted/held", the combinations that were and were never mined. A source
    of which every judgement failed has no rate; its failures count in the rate over all sources.
    """
    sources = {p.prompt_id: p.source.rpartition(":")[0] or p.source for p in prompts}
    groups: dict[str, list[Comparison]] = {}
    for row in comparisons:
        if row.against == 0 and row.iteration > 0:
            groups.setdefault(sources[row.prompt_id], []).append(row)
    figures: dict[str, float] = {}
    for source, rows in groups.items() if len(groups) > 1 else ():
        judged = [row for row in rows if row.outcome is not None]
        rates = win_rates(judged, seed=seed, resamples=resamples)
        for name in ("refined_vs_0", "initial_vs_0", "refined_vs_initial_0"):
            if name in rates:
                figures |= _interval(f"win_rate/{_plain(source)}/{name}", rates[name])
    return figures


def _interval(name: str, rate: WinRate) -> dict[str, float]:
    return {name: rate.rate, f"{name}_low": rate.low, f"{name}_high": rate.high}


def _plain(source: str) -> str:
    """A source as MLflow allows it in a metric's name."""
    return re.sub(r"[^\w. -]+", "-", source).strip("-")


def answer_metrics(answers: Sequence[Answer]) -> dict[str, float]:
    """What the answers look like: lengths in characters, shares in [0, 1], tokens a prompt."""
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


def faithfulness_metrics(
    judge: PrincipleJudge, *, labelled: Sequence[Labelled], answers: Sequence[Answer]
) -> dict[str, float]:
    """Does a refinement do what the principle asks that it is filed under? Shares in [0, 1].

    For the kept trajectories under their own principle ("original") and under the label that is
    trained on ("label"); and for the answers to held-out prompts under the principle that the
    policy gave itself ("answers"). `faithfulness/failed` counts what the judge could not say.
    """
    claims = {
        "original": [(row.principle, row.refined) for row in labelled],
        "label": [(row.label, row.refined) for row in labelled],
        "answers": [(row.principle, row.refined) for row in answers],
    }
    figures: dict[str, float] = {}
    failed = 0
    for name, pairs in claims.items():
        verdicts = judge.follows([z for z, _ in pairs], [y for _, y in pairs])
        told = [v for v in verdicts if v is not None]
        failed += len(verdicts) - len(told)
        if told:
            figures[f"faithfulness/{name}"] = fmean(told)
    return figures | {"faithfulness/failed": float(failed)}


def planted_metrics(
    *,
    scored: Iterable[Scored],
    labelled: Sequence[Labelled],
    principles: Sequence[str],
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
) -> dict[str, float]:
    """What only the planted world's truth can tell; shares in [0, 1].

    - `planted/nmi`, `planted/ari`: the clusters against the behaviour that each distinct kept
      principle names (malformed ones left out and counted).
    - `planted/precision`: entries of the constitution (`principles`) that name a behaviour which
      prompts call for; `planted/recall`: such behaviours that at least one entry names;
      `planted/duplicates`: entries that name a behaviour which another entry already names.
    - `planted/hinted_right`, `kept_right`, `invented_right`: principles that the prompt calls for
      and y1 lacks, among all sampled candidates, the kept trajectories and the held-out answers.
    - `planted/core_initial`, `planted/core_refined`: how much of the content survives.
    """
    from models.planted import oracle

    def right(prompt: Sequence[Message], initial: str, principle: str) -> bool:
        named = oracle.behaviour_of(principle)
        return named in oracle.needed(prompt[-1]["content"]) - oracle.shown(initial)

    asked = {p.prompt_id: p.prompt for p in prompts}
    shares: dict[str, Sequence[float]] = {
        "hinted_right": [
            right(r.prompt, r.initial, c.principle) for r in scored for c in r.candidates
        ],
        "kept_right": [right(r.prompt, r.initial, r.principle) for r in labelled],
        "invented_right": [right(asked[a.prompt_id], a.initial, a.principle) for a in answers],
        "core_initial": [
            oracle.core_share(asked[a.prompt_id][-1]["content"], a.initial) for a in answers
        ],
        "core_refined": [
            oracle.core_share(asked[a.prompt_id][-1]["content"], a.refined) for a in answers
        ],
    }
    return (
        {f"planted/{name}": fmean(values) for name, values in shares.items() if values}
        | _recovery(principles, oracle.TRUTH, oracle.behaviour_of)
        | _agreement(labelled, oracle.behaviour_of)
    )


def _recovery(
    principles: Sequence[str], truth: frozenset[str], behaviour_of: Callable[[str], str | None]
) -> dict[str, float]:
    """Precision, recall and duplicates of the constitution against the truth."""
    named = [b for b in map(behaviour_of, principles) if b in truth]
    figures = {"planted/recall": len(set(named)) / len(truth)}
    if principles:
        figures["planted/precision"] = len(named) / len(principles)
        figures["planted/duplicates"] = float(len(named) - len(set(named)))
    return figures


def _agreement(
    labelled: Sequence[Labelled], behaviour_of: Callable[[str], str | None]
) -> dict[str, float]:
    """NMI and ARI of the clusters of distinct principles against what they name."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    clusters = {row.principle: row.cluster for row in labelled}
    named = {z: b for z in clusters if (b := behaviour_of(z)) is not None}
    figures = {"planted/malformed": float(len(clusters) - len(named))}
    if len(named) > 1:
        truth, found = list(named.values()), [clusters[z] for z in named]
        figures["planted/nmi"] = float(normalized_mutual_info_score(truth, found))
        figures["planted/ari"] = float(adjusted_rand_score(truth, found))
    return figures
