"""The EM loop, readable on one screen.

`em_experiment` is what `staple run` and the scheduled deployment call; every stage looks into the
record first and computes only what is not there.
"""

from __future__ import annotations

from prefect import flow

from flows.experiment import open_experiment
from flows.publish import Attempts, publish_experiment, publish_iteration
from flows.settings import ExperimentSettings
from tasks.cluster import cluster_stage
from tasks.evaluate import evaluate_stage
from tasks.filter import filter_stage
from tasks.mine import mine_stage
from tasks.prompts import prompts_stage
from tasks.score import score_stage
from tasks.train import train_stage


@flow(name="em-experiment", flow_run_name="{settings.experiment}")
def em_experiment(settings: ExperimentSettings, force: bool = False) -> list[Attempts]:
    """T EM iterations, after the initial policy's own answers (iteration 0)."""
    done = [em_initial(settings, force)]
    for iteration in range(1, settings.iterations + 1):
        done.append(em_iteration(settings, iteration, force))
    publish_experiment(open_experiment(settings), done)
    return done


@flow(name="em-initial", flow_run_name="{settings.experiment} iteration 0")
def em_initial(settings: ExperimentSettings, force: bool = False) -> Attempts:
    """Iteration 0: the untouched policy answers the held-out prompts."""
    experiment = open_experiment(settings, force)
    at = experiment.slot(0)
    held_out = prompts_stage(at, settings.prompts)
    evaluated = evaluate_stage(
        at, settings.evaluate, settings.score, experiment.policy(0), held_out
    )
    return publish_iteration(experiment, 0, prompts=held_out, evaluate=evaluated)


@flow(name="em-iteration", flow_run_name="{settings.experiment} iteration {iteration}")
def em_iteration(settings: ExperimentSettings, iteration: int, force: bool = False) -> Attempts:
    """One EM iteration: E-step (mine, score, filter), constitution, M-step, evaluation."""
    experiment = open_experiment(settings, force)
    at, policy = experiment.slot(iteration), experiment.policy(iteration - 1)

    prompts = prompts_stage(at, settings.prompts)
    mined = mine_stage(at, settings.mine, policy, prompts)
    scored = score_stage(at, settings.score, mined)
    kept = filter_stage(at, settings.filter, scored)
    earlier = experiment.earlier_constitutions(iteration)
    labelled = cluster_stage(at, settings.cluster, policy, kept, scored, earlier)
    trained = train_stage(at, settings.train, policy, labelled)
    evaluated = evaluate_stage(
        at,
        settings.evaluate,
        settings.score,
        policy.trained(trained),
        **experiment.references(iteration),
        scored=scored,
        labelled=labelled,
    )
    return publish_iteration(
        experiment,
        iteration,
        prompts=prompts,
        mine=mined,
        score=scored,
        filter=kept,
        cluster=labelled,
        train=trained,
        evaluate=evaluated,
    )
