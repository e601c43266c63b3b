"""One stage by itself: what `staple stage` and Prefect's UI re-run.

It reads the current outputs upstream from the record and writes a new attempt; what follows in the
iteration becomes stale, visibly, and is not touched.
"""

from __future__ import annotations

from prefect import flow

from constitutions.errors import UserError
from flows.experiment import STAGES, Experiment, open_experiment
from flows.settings import ExperimentSettings
from tasks.cluster import cluster_stage
from tasks.evaluate import evaluate_stage
from tasks.filter import filter_stage
from tasks.mine import mine_stage
from tasks.prompts import prompts_stage
from tasks.score import score_stage
from tasks.store import Attempt
from tasks.train import train_stage


@flow(name="stage", flow_run_name="{settings.experiment} {stage} {iteration}")
def run_stage(
    settings: ExperimentSettings, stage: str, iteration: int, force: bool = False
) -> Attempt:
    """Run one stage of one iteration.

    Raises:
        UserError: there is no such stage, or something that it reads was never finished.
    """
    if stage not in RUNNERS or (iteration == 0 and stage not in ("prompts", "evaluate")):
        raise UserError(
            f"iteration {iteration} has no stage '{stage}'",
            expected=f"one of {', '.join(RUNNERS)}" if iteration else "prompts or evaluate",
        )
    return RUNNERS[stage](open_experiment(settings, force), iteration)


def _prompts(e: Experiment, t: int) -> Attempt:
    return prompts_stage(e.slot(t), e.settings.prompts)


def _mine(e: Experiment, t: int) -> Attempt:
    return mine_stage(e.slot(t), e.settings.mine, e.policy(t - 1), e.record.needs("prompts", t))


def _score(e: Experiment, t: int) -> Attempt:
    return score_stage(e.slot(t), e.settings.score, e.record.needs("mine", t))


def _filter(e: Experiment, t: int) -> Attempt:
    return filter_stage(e.slot(t), e.settings.filter, e.record.needs("score", t))


def _cluster(e: Experiment, t: int) -> Attempt:
    kept, scored = e.record.needs("filter", t), e.record.needs("score", t)
    earlier = e.earlier_constitutions(t)
    return cluster_stage(e.slot(t), e.settings.cluster, e.policy(t - 1), kept, scored, earlier)


def _train(e: Experiment, t: int) -> Attempt:
    return train_stage(e.slot(t), e.settings.train, e.policy(t - 1), e.record.needs("cluster", t))


def _evaluate(e: Experiment, t: int) -> Attempt:
    at, settings, scoring = e.slot(t), e.settings.evaluate, e.settings.score
    if t == 0:
        return evaluate_stage(at, settings, scoring, e.policy(0), e.record.needs("prompts", 0))
    return evaluate_stage(
        at,
        settings,
        scoring,
        e.policy(t),
        **e.references(t),
        scored=e.record.needs("score", t),
        labelled=e.record.needs("cluster", t),
    )


RUNNERS = dict(
    zip(
        ("prompts", *STAGES),
        (_prompts, _mine, _score, _filter, _cluster, _train, _evaluate),
        strict=True,
    )
)
