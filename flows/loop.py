"""The flows of an experiment: T iterations, each of which runs the stages of `flows.em`.

This module imports Prefect, which takes seconds. A command imports it only to compute something.
"""

from __future__ import annotations

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext

from constitutions.constitution import load, markdown
from flows import review
from flows.em import steps
from flows.experiment import Experiment, Place, open_experiment, writing
from flows.publish import Attempts, constitution_of, publish_experiment, publish_iteration
from flows.schema import ExperimentSettings


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
    return publish(experiment, iteration, attempts)


@task(name="publish", cache_policy=NO_CACHE)
def publish(experiment: Experiment, iteration: int, attempts: Attempts) -> Attempts:
    """Show an iteration in MLflow, and its constitution in Prefect."""
    publish_iteration(experiment, iteration, attempts)
    approved = constitution_of(attempts)
    if approved and FlowRunContext.get() is not None:
        constitution = load(approved.path("constitution.yaml"))
        create_markdown_artifact(
            markdown(constitution), key="constitution", description=f"Iteration {iteration}"
        )
    return attempts
