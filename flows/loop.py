"""The flows of an experiment: T iterations, each of which runs the stages of `flows.em`.

This module imports Prefect, which takes seconds. A command imports it only to compute something.
"""

from __future__ import annotations

from collections.abc import Sequence

from prefect import flow, tags, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_URL

from constitutions.constitution import load, markdown
from flows import review
from flows.announce import announced_steps
from flows.champion import decided
from flows.experiment import Experiment, Place, open_experiment, recorded_names, writing
from flows.methods import method_of
from flows.mlflow_page import describe
from flows.publish import (
    Attempts,
    constitution_of,
    iteration_metrics,
    publish_experiment,
    publish_iteration,
    rate_text,
)
from flows.registry import crown, log_corpora, registered
from flows.schema import ExperimentSettings
from flows.server.pools import offer_experiments
from tasks.record.stage import artifact_key


@flow(name="em-experiment", flow_run_name="{settings.experiment}")
def em_experiment(
    settings: ExperimentSettings, force: bool = False, start: Place | None = None
) -> list[Attempts]:
    """Iteration 0 (the initial policy answers), then T iterations, under the write lock.

    With `iterations: auto`, until two in a row do not become the champion.

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

        def iterate(t: int) -> Attempts:
            with tags(settings.experiment, f"iteration {t}"):
                return em_iteration(settings, t, force, start)

        for t in range(settings.last + 1):
            done.append(iterate(t))
            if t and "train" not in done[t]:
                if not review.can_ask():
                    return done
                review.ask(experiment, t, done[t]["cluster"])
                done[t] = iterate(t)
            if experiment.stops(t):
                break
        publish_experiment(experiment, done)
        _show(experiment, done)
        return done


@flow(name="em-iteration", flow_run_name="{settings.experiment} iteration {iteration}")
def em_iteration(
    settings: ExperimentSettings, iteration: int, force: bool = False, start: Place | None = None
) -> Attempts:
    """One iteration: stage → its attempt; without "train" if a person has to review first."""
    experiment = open_experiment(settings, force=force, start=start)
    attempts = {attempt.stage: attempt for attempt in announced_steps(experiment, iteration)}
    return publish(experiment, iteration, attempts)


@task(name="publish", cache_policy=NO_CACHE)
def publish(experiment: Experiment, iteration: int, attempts: Attempts) -> Attempts:
    """Decide about the champion; show an iteration in MLflow, and its constitution in Prefect."""
    attempts = decided(experiment, iteration, attempts)
    model = registered(experiment, iteration, attempts)
    if publish_iteration(experiment, iteration, attempts, model):
        log_corpora(experiment, iteration, attempts["prompts"])
    crown(experiment)
    describe(experiment, iteration, registered=bool(model))
    _show_constitution(experiment, iteration, attempts)
    if iteration == 0:
        _offer()
    return attempts


def _offer() -> None:
    """Let the stages' forms on Prefect's server offer this experiment, too."""
    if PREFECT_API_URL.value():
        with get_client(sync_client=True) as client:
            offer_experiments(client, recorded_names())


def _show(experiment: Experiment, done: Sequence[Attempts]) -> None:
    """The experiment's result on its own flow run: win rates, and the last constitution."""
    if FlowRunContext.get() is None:
        return
    name, method = experiment.settings.experiment, method_of(experiment.settings)
    history = [iteration_metrics(attempts) for attempts in done]
    create_table_artifact(
        table=[
            {
                "iteration": t,
                "win rate": rate_text(metrics, method.headline),
                "at equal lengths": rate_text(metrics, f"{method.headline}_length_controlled"),
                "principles": metrics.get("constitution_size", 0.0),
            }
            for t, metrics in enumerate(history)
        ],
        key=artifact_key(name, "win rates"),
        description=f"**{name}**: held-out answers against the initial policy's, 95 % intervals",
    )
    _show_constitution(experiment, len(done) - 1, done[-1])


def _show_constitution(experiment: Experiment, iteration: int, attempts: Attempts) -> None:
    approved = constitution_of(attempts)
    if approved and FlowRunContext.get() is not None:
        name = experiment.settings.experiment
        create_markdown_artifact(
            markdown(load(approved.path("constitution.yaml"))),
            key=artifact_key(name, "constitution"),
            description=f"**{name}**, iteration {iteration}",
        )
