"""What MLflow's page of an experiment shows first: what it is and found, and its iterations' table.

`flows.loop` describes the experiment after each iteration; commands print the table's address.
"""

from __future__ import annotations

import json

from flows.experiment import Experiment
from flows.methods import method_of
from flows.publish import iteration_metrics
from flows.schema import ExperimentSettings
from tasks.record.connection import TRAINING, RecordConnection
from tasks.report.headline import Headline

NOTE = "mlflow.note.content"
"""Tag: the description, in Markdown."""
COLUMNS = 6
"""Figures in the table: as many as a page shows."""
VIEW = "iterations"
"""The name under which MLflow shares the table's columns and the order of charts."""


SECTION = {"uuid": "figures", "name": "Main figures", "display": True, "isReordered": False}
"""The first section of charts; MLflow adds those of all other figures, by their names."""


def describe(e: Experiment, iteration: int, *, registered: bool) -> None:
    """Say on MLflow's page what the experiment is and has found, up to this iteration.

    Args:
        registered: whether its models are, whose page then says it, too.
    """
    history = {t: iteration_metrics(e.current(t)) for t in range(iteration + 1)}
    found = method_of(e.settings).found(e.settings, history)
    figures = method_of(e.settings).figures(e.settings)
    shared = {
        "selectedColumns": [f"metrics.`{name}`" for name in figures[:COLUMNS]],
        "compareRunCharts": [_chart(n) for n in figures if not n.endswith(("_low", "_high"))],
        "compareRunSections": [SECTION],
        "isAccordionReordered": True,
    }
    tags = {
        **TRAINING,
        NOTE: _description(e, iteration, found),
        f"mlflow.sharedViewState.{VIEW}": json.dumps(shared),
    }
    for name, text in tags.items():
        e.record.client.set_experiment_tag(e.record.experiment_id, name, text)
    if registered:
        e.record.client.update_registered_model(e.settings.experiment, _models(e, found))


def table_url(server: str, record: RecordConnection) -> str:
    """The address of an experiment's iterations on an MLflow server."""
    return f"{server.rstrip('/')}/{_table(record)}"


def _table(record: RecordConnection) -> str:
    chosen = f"workflowType=machine_learning&viewStateShareKey={VIEW}"
    return f"#/experiments/{record.experiment_id}/runs?{chosen}"


def _chart(metric: str) -> dict[str, object]:
    """A bar for each iteration, as MLflow stores the charts of a page."""
    return {
        "type": "BAR",
        "uuid": metric,
        "metricKey": metric,
        "metricSectionId": SECTION["uuid"],
        "runsCountToCompare": 20,
        "deleted": False,
        "isGenerated": True,
    }


def _description(e: Experiment, iteration: int, found: Headline | None) -> str:
    settings, name = e.settings, e.settings.experiment
    models = f", [models](#/models/{name})" if iteration else ""
    return "\n\n".join(
        [
            f"**{found or 'No win rate is measured yet.'}**",
            f"{_what(settings)}, iteration {iteration} of {settings.last}.",
            f"[Iterations by their main figures]({_table(e.record)}){models}. An iteration's run "
            "has its constitution, map and adapter; below it are the runs of its stages, with "
            "settings, all figures and outputs. The run `summary` has the curves.",
            f"`staple status {name}` says what is out of date; `staple report {name}` writes all "
            "of it as one page.",
        ]
    )


def _models(e: Experiment, found: Headline | None) -> str:
    name = e.settings.experiment
    return "\n\n".join(
        [
            f"**{found or 'No win rate is measured yet.'}**",
            f"{_what(e.settings)}. A version is the policy after one training; its tag "
            "`iteration` says which. `champion` is the one that won on held-out prompts which no "
            "decision had used before; without that alias it is the initial policy.",
            f"`staple serve {name}` answers with it, `staple export {name}` writes it to a folder.",
        ]
    )


def _what(settings: ExperimentSettings) -> str:
    """What was trained, how, and on which prompts."""
    prompts = settings.prompts
    source = ", ".join(corpus.label for corpus in prompts.corpora)
    if prompts.world:
        source = f"the {prompts.world.name} world"
    return f"{method_of(settings).title(settings)} of {settings.policy.model} on {source}"
