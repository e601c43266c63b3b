"""Evaluation: what did an iteration gain, on prompts that no iteration has mined?

`tasks.policies.answers` lets the policy answer, `tasks.judging.panel` has the judges decide,
`tasks.judging.rates` and `tasks.judging.truth` turn rows into figures. The benchmarks are answered
with the rest, before any judge is opened: the judges then have the policy's memory.

A figure that is undefined (nothing was kept, so nothing can be faithful) is left out: never NaN,
never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field, field_validator, model_validator

from constitutions.constitution import load
from constitutions.errors import UserError
from models.judges.registry import JudgeSettings, kinds_that, open_policy
from models.worlds.base import Oracle
from models.worlds.registry import WORLDS
from tasks.benchmarks.registry import BenchmarkSettings
from tasks.judging.gate import GatePoint, gate_curve, gate_metrics
from tasks.judging.judge import judge_notes, noted
from tasks.judging.pairs import AnswerPair, answer_pairs, principle_pairs
from tasks.judging.panel import Panel
from tasks.judging.rates import (
    agreement_metrics,
    length_metrics,
    order_metrics,
    rate_metrics,
    source_metrics,
    win_rate_metrics,
    win_rates,
)
from tasks.judging.truth import faithfulness_metrics, truth_metrics, world_of
from tasks.policies.answers import AnswerSettings, Generation, Respondent, answer_metrics
from tasks.policies.opening import PolicySource
from tasks.record.record import Attempt
from tasks.record.slot import Slot
from tasks.record.stage import stage
from tasks.record.work import Metrics, Workspace
from tasks.rows import Answer, Labelled, Mined, Prompt
from tasks.score import ScoreSettings
from tasks.similarity.registry import open_similarity


class EvaluateSettings(AnswerSettings):
    """How the held-out prompts and the benchmarks are answered and judged."""

    judge: JudgeSettings = JudgeSettings()
    """Who compares answers."""
    also: tuple[JudgeSettings, ...] = ()
    """Further judges of the same pairs: their agreement with the first is reported (Cohen's κ), and
    no win rate is theirs."""
    principle_judge: JudgeSettings | None = None
    """An LLM that judges whether a refinement follows its principle better than the first response
    does; unset: no such figure."""
    max_failed: float = Field(default=0.1, ge=0, le=1)
    """Share of failed judgements above which there is no win rate, but an error."""
    resamples: int = Field(default=10_000, ge=100, le=1_000_000)
    """Bootstrap resamples of a win rate's interval."""
    benchmarks: BenchmarkSettings = BenchmarkSettings()
    """Public benchmarks that the policy is measured by as well."""

    @field_validator("judge", "principle_judge", mode="before")
    @classmethod
    def _word(cls, judge: Any) -> Any:
        """ "oracle" is the judge of this kind."""
        return {"kind": judge} if isinstance(judge, str) else judge

    @field_validator("also", mode="before")
    @classmethod
    def _words(cls, judges: Any) -> Any:
        return [cls._word(j) for j in judges] if isinstance(judges, list | tuple) else judges

    @model_validator(mode="after")
    def _judges_that_can(self) -> EvaluateSettings:
        if self.principle_judge and not self.principle_judge.judge_type.generates:
            able = kinds_that(lambda judge: judge.generates)
            raise ValueError(f"principle_judge needs an LLM: its kind is {able}")
        list(self.benchmarks.judges(self.judge))
        return self

    @property
    def judges(self) -> tuple[JudgeSettings, ...]:
        """Who compares the held-out answers; the first one's verdicts count."""
        return (self.judge, *self.also)

    @property
    def all_judges(self) -> list[JudgeSettings]:
        """All judges on which the outputs depend."""
        others = [judge for _, judge in self.benchmarks.judges(self.judge)]
        principle = [self.principle_judge.about_principles()] if self.principle_judge else []
        return [*self.judges, *principle, *others]


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
    champion: Attempt | None = None,
    mined: Attempt | None = None,
    labelled: Attempt | None = None,
) -> Attempt:
    """held-out prompts, earlier policies' answers → answers, comparisons, metrics.

    Iteration 0 has nothing earlier: its refined answers are compared with its own first ones.

    Args:
        scoring: the similarity of the judge "similarity".
        champion: the best policy before, where it is neither of the two.

    Raises:
        UserError: a benchmark's file or a judge is wrong (before anything is answered); more than
            `max_failed` of the judgements of one kind failed (the finished shards are kept).
    """
    earlier = {"initial": initial, "previous": previous, "champion": champion}
    references = [attempt for attempt in earlier.values() if attempt]
    given = {"held_out": held_out, **earlier, "mined": mined, "labelled": labelled}
    inputs = {name: attempt for name, attempt in given.items() if attempt}

    def compute(work: Workspace) -> Metrics:
        prompts = held_out.read("prompts", Prompt)
        world, guided = world_of(prompts), policy.templates.guided
        oracle = world.oracle if world else None
        check_judges(settings, scoring, oracle)
        benchmarks = settings.benchmarks.load(settings.judge, guided=guided)

        with policy.pool() as pool:
            generation = Generation(
                templates=policy.templates,
                settings=settings,
                seed=at.seed,
                iteration=at.iteration,
                weighs=not policy.settings.endpoint,
            )
            respondent = Respondent(pool=pool, generation=generation, work=work)
            answers = respondent.answers("answers", prompts)
            answered = {name: b.answer(respondent) for name, b in benchmarks.items()}

        once = {attempt.run_id: attempt for attempt in references}  # at iteration 1 they are one
        compared = [answers, *(attempt.read("answers", Answer) for attempt in once.values())]
        pairs = [pair for other in compared for pair in answer_pairs(answers, other, prompts)]
        with panel_of(settings, scoring, at, work, oracle) as panel:
            metrics = answer_metrics(answers) | _compared(panel, settings, pairs, answers, prompts)
            if settings.principle_judge and guided:
                metrics |= _principles(panel, settings.principle_judge, answers, prompts)
            for name, benchmark in benchmarks.items():
                metrics |= benchmark.measure(answered[name], panel)
        if world and oracle and mined and labelled:
            metrics |= _truth(world.name, oracle, prompts, answers, mined, labelled)
        return metrics

    where = noted_judges(policy.noted(at), settings, scoring)
    return where.attempt("evaluate", settings, policy.inputs(**inputs), compute)


def check_judges(settings: EvaluateSettings, scoring: ScoreSettings, oracle: Oracle | None) -> None:
    """Refuse judges that cannot judge these prompts, before anything is answered.

    Raises:
        UserError: the oracle where there is none; a similarity that needs more than the gold.
    """
    for judge in settings.judges:
        kind = judge.on(oracle)
        if kind.needs_oracle and not oracle:
            raise UserError(
                "the oracle knows only the prompts of an embedded world",
                where="evaluate.judge",
                expected="another kind of judge",
            )
        similarity = open_similarity(scoring)
        if kind.needs_gold and similarity.reads_prompt:
            similarity.compare("", ())  # raises the error that says why it cannot


def noted_judges(at: Slot, settings: EvaluateSettings, scoring: ScoreSettings) -> Slot:
    """The slot with what the judges and the benchmarks depend on, and the device that they take."""
    at, notes = at.using(*settings.benchmarks.uses), settings.benchmarks.notes()
    if any(judge.on(oracle=None).needs_gold for judge in settings.judges):
        notes["scoring"] = scoring.model_dump_json(
            exclude={"judge", "max_unscored"}, exclude_none=True
        )
        similarity = open_similarity(scoring)
        at = at if similarity.reads_prompt else similarity.noted(at)
    at = at.using(*(world.truth for world in WORLDS.values() if world.truth))
    notes = {**at.notes, **notes}
    for number, judge in enumerate(settings.all_judges, start=1):
        found = judge_notes(judge, at.record.home)
        which = f" {number}" if number > 1 else ""
        notes |= {f"{name}{which}": value for name, value in found.items()}
        at = noted(at, judge)  # for the device; its notes would overwrite each other
    return replace(at, notes=notes)


def panel_of(
    settings: EvaluateSettings,
    scoring: ScoreSettings,
    at: Slot,
    work: Workspace,
    oracle: Oracle | None,
) -> Panel:
    """The judges of an iteration, none of them opened yet."""
    return Panel(
        oracle=oracle,
        scoring=scoring,
        model=f"{at.record.experiment}-iteration-{at.iteration}",
        work=work,
        iteration=at.iteration,
        seed=at.seed,
        resamples=settings.resamples,
        max_failed=settings.max_failed,
        open_policy=open_policy,
    )


def _compared(
    panel: Panel,
    settings: EvaluateSettings,
    pairs: Sequence[AnswerPair],
    answers: Sequence[Answer],
    prompts: Sequence[Prompt],
) -> Metrics:
    """Win rates by the first judge; how far to trust it, and how far the others agree with it; and
    the curve of a policy's gate."""
    rows, *others = panel.compare("comparisons", pairs, settings.judges)
    how = {"seed": panel.seed, "resamples": panel.resamples}
    curve = gate_curve(answers, rows, **how)
    if curve:
        panel.work.write("gate", curve, GatePoint)
    return {
        **gate_metrics(curve),
        **win_rate_metrics(win_rates(rows, max_failed=panel.max_failed, **how)),
        **source_metrics(rows, prompts, **how),
        **length_metrics(rows, seed=panel.seed),
        **order_metrics("judge", rows),
        **agreement_metrics(rows, [row for part in others for row in part]),
    }


def _principles(
    panel: Panel, judge: JudgeSettings, answers: Sequence[Answer], prompts: Sequence[Prompt]
) -> Metrics:
    """How often a refinement follows its principle better than the first response does."""
    pairs = principle_pairs(answers, prompts)
    if not pairs:
        return {}
    (rows,) = panel.compare("principle-comparisons", pairs, [judge.about_principles()])
    return rate_metrics("principle/win_rate", panel.rate(rows, "principle-following win rate"))


def _truth(
    world: str,
    oracle: Oracle,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    mined: Attempt,
    labelled: Attempt,
) -> Metrics:
    """What only the oracle of the embedded world can measure."""
    rows = labelled.read("labelled", Labelled)
    return faithfulness_metrics(oracle, labelled=rows, answers=answers) | truth_metrics(
        world,
        oracle,
        mined=mined.rows("mined", Mined),
        labelled=rows,
        principles=load(labelled.path("constitution.yaml")).texts,
        prompts=prompts,
        answers=answers,
    )
