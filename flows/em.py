"""The EM loop of STaPLe and its baselines, on one screen.

`steps` is the one wiring of the stages: the loop runs all of them, `flows.stages` one of them, and
`flows.states` none: it asks for their states. A stage reuses its result from the record if nothing
changed.
"""

from __future__ import annotations

from collections.abc import Iterator

from prefect import flow

from flows import review, sami
from flows.experiment import Experiment, Place, open_experiment, writing
from flows.methods import method_of
from flows.publish import Attempts, publish_experiment, publish_iteration
from flows.schema import ExperimentSettings
from tasks.cluster import cluster_stage
from tasks.evaluate import evaluate_stage
from tasks.filter import filter_stage
from tasks.mine import mine_stage
from tasks.prompts import prompts_stage
from tasks.record.record import Attempt
from tasks.review import review_stage
from tasks.score import score_stage
from tasks.train import train_stage


def steps(e: Experiment, t: int) -> Iterator[Attempt]:
    """One EM iteration, stage by stage; it ends early if a person has to review first.

    E-step (mine, score, filter), constitution (cluster, review), M-step (train), evaluation: each
    method has some of them (`flows.methods`). In iteration 0 the initial policy answers the
    held-out prompts.
    """
    method = method_of(e.settings)
    if method.constitutional:
        yield from sami.steps(e, t)
        return
    at, settings = e.slot(t), e.settings_at(t)
    yield (prompts := prompts_stage(at, settings.prompts))
    if t == 0:
        yield evaluate_stage(at, settings.evaluate, settings.score, e.policy(0), prompts)
        return

    policy = e.policy(t - 1, t)
    examples, mined_from = prompts, {}
    if method.mines:
        yield (mined := mine_stage(at, settings.mine, policy, prompts))
        yield (scored := score_stage(at, settings.score, mined))
        yield (examples := filter_stage(at, settings.filter, scored, method.guided))

    if method.guided:
        earlier = e.earlier_constitutions(t)
        yield (examples := cluster_stage(at, settings.cluster, policy, examples, scored, earlier))
        if settings.review.enabled:
            verdict = e.verdict(t, examples)
            if verdict is None:
                return
            yield (examples := review_stage(at, settings.review, examples, verdict))
        mined_from = {"scored": scored, "labelled": examples}

    yield (trained := train_stage(at, settings.train, policy, examples))
    tuned, references = policy.trained(trained), e.references(t)
    yield evaluate_stage(at, settings.evaluate, settings.score, tuned, **references, **mined_from)


@flow(name="em-experiment", flow_run_name="{settings.experiment}")
def em_experiment(
    settings: ExperimentSettings, force: bool = False, start: Place | None = None
) -> list[Attempts]:
    """Iteration 0 (the initial policy answers), then T iterations, under the write lock.

    Returns:
        The attempts of every iteration. If a person has to review and this run cannot ask, the list
        ends with the waiting iteration, whose attempts lack "train".

    Args:
        force: compute again what the record has.
        start: compute again from this stage on; earlier stages come from the record.
    """
    with writing(settings.experiment, f"staple run {settings.experiment}"):
        experiment = open_experiment(settings, force=force, start=start)
        done: list[Attempts] = []
        for t in range(settings.iterations + 1):
            done.append(em_iteration(settings, t, force, start))
            if t and "train" not in done[t]:
                if not review.can_ask():
                    return done
                review.ask(experiment, t, done[t]["cluster"])
                done[t] = em_iteration(settings, t, force, start)
        publish_experiment(experiment, done)
        return done


@flow(name="em-iteration", flow_run_name="{settings.experiment} iteration {iteration}")
def em_iteration(
    settings: ExperimentSettings, iteration: int, force: bool = False, start: Place | None = None
) -> Attempts:
    """One iteration: stage → its attempt; without "train" if a person has to review first."""
    experiment = open_experiment(settings, force=force, start=start)
    attempts = {attempt.stage: attempt for attempt in steps(experiment, iteration)}
    return publish_iteration(experiment, iteration, attempts)
