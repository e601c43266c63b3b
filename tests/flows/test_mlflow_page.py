"""What MLflow's page of an experiment says, as `flows.loop` leaves it after each iteration."""

from __future__ import annotations

import json

import pytest

from flows.commands.listing import overview
from flows.experiment import Experiment, open_experiment, writing
from flows.loop import publish
from flows.mlflow_page import NOTE, VIEW, table_url
from flows.publish import iteration_metrics, publish_experiment, shown_metrics
from flows.schema import ExperimentSettings
from tasks.record.record import SUMMARY


def published(settings: ExperimentSettings) -> Experiment:
    """The finished experiment, shown in MLflow as its flow does."""
    with writing(settings.experiment, "a test"):
        e = open_experiment(settings)
        for t in (0, 1):
            publish.fn(e, t, e.current(t))
    return e


def tags(e: Experiment) -> dict[str, str]:
    return dict(e.record.client.get_experiment(e.record.experiment_id).tags)


def test_the_page_says_what_was_found(at_home: ExperimentSettings) -> None:
    e = published(at_home)
    shown = tags(e)
    assert shown["mlflow.experimentKind"] == "custom_model_development", "it opens on runs"
    found = overview(at_home).headline
    assert found and str(found) in shown[NOTE], "the same words as on the console"
    assert "STaPLe, constrained of " in shown[NOTE]
    assert "on rows.jsonl, iteration 1 of 1" in shown[NOTE]
    assert table_url("", e.record).strip("/") in shown[NOTE]
    models = e.record.client.get_registered_model(at_home.experiment).description
    assert str(found) in models and "staple serve lineage" in models
    columns = json.loads(shown[f"mlflow.sharedViewState.{VIEW}"])["selectedColumns"]
    assert columns[0] == "metrics.`win_rate/refined_vs_initial_0`"


def test_a_run_shows_figures_of_one_iteration(at_home: ExperimentSettings) -> None:
    """In MLflow's table, which shows the newest point of a metric."""
    e = published(at_home)
    done = [e.current(t) for t in (0, 1)]
    own, all_of_it = shown_metrics(e, done[1]), iteration_metrics(done[1])
    assert {"constitution_size", "refinement_rate", "seconds"} <= set(own)
    assert len(own) <= 12 < len(all_of_it)
    assert all_of_it.items() >= {n: v for n, v in own.items() if n != "seconds"}.items()
    run = e.record.client.get_run(e.record.iteration_run(1))
    assert run.data.metrics == own
    took = (run.info.end_time - run.info.start_time) / 1000
    assert took == pytest.approx(sum(a.seconds for a in done[1].values()), abs=0.01)

    with writing("lineage", "a test"):
        publish_experiment(e, done)
    summary = e.record.client.get_run(e.record.iteration_run(SUMMARY))
    assert summary.data.metrics == own, "the last iteration's, and no figure that it lacks"
    curve = e.record.client.get_metric_history(summary.info.run_id, "seconds")
    assert [point.step for point in curve] == [0, 1]


def test_a_new_experiment_opens_on_runs(at_home: ExperimentSettings) -> None:
    e = open_experiment(at_home.model_copy(update={"experiment": "new"}))
    assert tags(e)["mlflow.experimentKind"] == "custom_model_development"
