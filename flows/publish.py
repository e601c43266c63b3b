"""The top-level MLflow run of an iteration, and the experiment's summary run, for people to read.

They gather what the stages recorded; nothing is computed here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from flows.experiment import Experiment
from flows.methods import method_of
from tasks.judging.champion import ChampionDecision
from tasks.record.record import SUMMARY, Attempt, Record
from tasks.record.work import Metrics
from tasks.report.figures import History, figures
from tasks.stages import STAGES

Attempts = dict[str, Attempt]

PUBLISHED = "published"
"""Tag: the attempts that a run shows. An unchanged rerun adds no points to its curves."""


def publish_iteration(
    experiment: Experiment, iteration: int, attempts: Attempts, model: str = ""
) -> bool:
    """Headline metrics, constitution, figures and adapter on the iteration's top-level run.

    Args:
        model: the id of its logged model, which the metrics are about.

    Returns:
        Whether there was anything new to show.
    """
    record = experiment.record
    if not _changed(record, iteration, attempts):
        return False
    metrics = shown_metrics(experiment, attempts)
    record.log_iteration(iteration, metrics, _files(attempts), model)
    record.took(record.iteration_run(iteration), metrics["seconds"])
    _mark(record, iteration, attempts)
    return True


def publish_experiment(experiment: Experiment, done: Sequence[Attempts]) -> None:
    """The curves over iterations, as metrics with steps and as figures, on the summary run.

    MLflow's table shows the newest point of a metric: only those that the last iteration has are
    logged, so that all that it shows are the last iteration's.
    """
    record = experiment.record
    if is_published(record, done):
        return
    run_id = record.iteration_run(SUMMARY)
    curves = [shown_metrics(experiment, attempts) for attempts in done]
    for t, metrics in enumerate(curves):
        last = {name: value for name, value in metrics.items() if name in curves[-1]}
        record.log_metrics(run_id, last, step=t)
    record.took(run_id, sum(metrics["seconds"] for metrics in curves))
    history = {t: iteration_metrics(attempts) for t, attempts in enumerate(done)}
    constitutional = method_of(experiment.settings).constitutional
    log_figures(record, history, constitutional=constitutional)
    _mark(record, SUMMARY, _every(done))


def log_figures(record: Record, history: History, *, constitutional: bool) -> None:
    """Log the figures of an experiment on its summary run; they replace earlier ones.

    Args:
        constitutional: see `figures`.
    """
    run_id = record.iteration_run(SUMMARY)
    for name, figure in figures(history, constitutional=constitutional).items():
        record.client.log_figure(run_id, figure, f"{name}.png")


def is_published(record: Record, done: Sequence[Attempts]) -> bool:
    """Whether the summary run shows exactly these attempts."""
    return not _changed(record, SUMMARY, _every(done))


def _every(done: Sequence[Attempts]) -> Attempts:
    return {f"{name}-{t}": a for t, attempts in enumerate(done) for name, a in attempts.items()}


def iteration_metrics(attempts: Mapping[str, Attempt]) -> Metrics:
    """All metrics of an iteration's stages, the seconds that each took, and the decision whether it
    became the champion."""
    metrics: Metrics = {}
    for name, attempt in attempts.items():
        metrics |= {key: v for key, v in attempt.metrics.items() if key != "seconds"}
        metrics[f"seconds/{name}"] = attempt.seconds
        if decision := ChampionDecision.read(attempt.decision):
            metrics |= decision.metrics
    return metrics


def shown_metrics(experiment: Experiment, attempts: Mapping[str, Attempt]) -> Metrics:
    """The figures that an iteration's own run shows, and the seconds of all its stages."""
    found = iteration_metrics(attempts)
    names = method_of(experiment.settings).figures(experiment.settings)
    shown = {name: found[name] for name in names if name in found}
    return shown | {"seconds": sum(attempt.seconds for attempt in attempts.values())}


def constitution_of(attempts: Mapping[str, Attempt]) -> Attempt | None:
    """The attempt with an iteration's constitution: reviewed, else clustered; for SAMI, written."""
    return attempts.get("review") or attempts.get("cluster") or attempts.get("write")


def rate_text(metrics: Mapping[str, float], name: str) -> str:
    """A rate with its interval: "0.95 [0.92, 0.97]"; a dash if it was not measured."""
    if name not in metrics:
        return "–"
    return f"{metrics[name]:.2f} [{metrics[f'{name}_low']:.2f}, {metrics[f'{name}_high']:.2f}]"


def _files(attempts: Mapping[str, Attempt]) -> list[Path]:
    """In the loop's order: a reviewed constitution replaces the clustered one."""
    there = [(attempts[name], stage) for name, stage in STAGES.items() if name in attempts]
    return [attempt.path(name) for attempt, stage in there for name in stage.publishes]


def _changed(record: Record, iteration: int, attempts: Mapping[str, Attempt]) -> bool:
    run = record.reader.run(record.iteration_run(iteration))
    return run.tags.get(PUBLISHED) != _state(attempts)


def _mark(record: Record, iteration: int, attempts: Mapping[str, Attempt]) -> None:
    record.client.set_tag(record.iteration_run(iteration), PUBLISHED, _state(attempts))


def _state(attempts: Mapping[str, Attempt]) -> str:
    return json.dumps({name: attempt.run_id[:8] for name, attempt in sorted(attempts.items())})
