"""The methods that an experiment is compared with, on the same stages, record and budget.

Each is the experiment with other settings, recorded as another experiment: E.star for E.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from prefect import flow
from prefect.artifacts import create_table_artifact

from constitutions.errors import UserError
from flows.experiment import writing
from flows.methods import method_of
from flows.publish import Attempts, iteration_metrics, rate_text
from flows.run import run_experiment
from flows.schema import ExperimentSettings
from flows.settings import parse_override, with_changes
from tasks.record.stage import artifact_key
from tasks.record.work import Metrics

BASELINES: Mapping[str, Mapping[str, Any]] = {
    "self-refine": {"method": "star", "iterations": 0},
    "star": {"method": "star"},
    "sft": {"method": "sft"},
    "unconstrained": {"method": "staple", "cluster.representative": "none"},
}
"""Name → what differs from the experiment's settings: no training and no principle; no principle;
golds in place of the policy's own refinements; every principle as it was sampled."""

Changes = Mapping[str, Mapping[str, Any]]
"""Baseline → further settings of it alone."""


class Run(NamedTuple):
    """A method that was run: its settings, the attempts of each iteration."""

    settings: ExperimentSettings
    done: list[Attempts]


@flow(name="baselines", flow_run_name="{settings.experiment} baselines")
def run_baselines(
    settings: ExperimentSettings,
    names: Sequence[str] = tuple(BASELINES),
    changes: Changes | None = None,
) -> list[Run]:
    """Run the experiment, then its baselines.

    In each iteration every method trains on the same number of tokens: `train.tokens`, or else the
    experiment's average. The table shows how many tokens each method generated and trained on.

    Raises:
        UserError: a baseline is unknown; changes name one that does not run; the method is SAMI.
    """
    check_names(names, changes or {})
    if method_of(settings).constitutional:
        raise UserError(
            "SAMI has no baselines",
            where=f"experiment {settings.experiment}, method sami",
            expected="another method",
            fix="staple run compares SAMI with the initial policy under the same constitution",
        )
    runs = [Run(settings, _run(settings))]
    tokens = settings.train.tokens or _trained_tokens(runs[0].done)
    for name in names:
        other = baseline_settings(settings, name, tokens, (changes or {}).get(name, {}))
        runs.append(Run(other, _run(other)))
    create_table_artifact(
        table=[row(run) for run in runs],
        key=artifact_key(settings.experiment, "baselines"),
        description=f"**{settings.experiment}** and its baselines, held-out prompts",
    )
    return runs


def baseline_settings(
    settings: ExperimentSettings, name: str, tokens: int | None, changes: Mapping[str, Any]
) -> ExperimentSettings:
    """The settings of one baseline: the experiment's, its own, and the changes, the last wins."""
    own: dict[str, Any] = {"train.tokens": tokens, "then": {}}
    own["experiment"] = f"{settings.experiment}.{name}"
    return with_changes(settings, {**own, **BASELINES[name], **changes})


def every_settings(
    settings: ExperimentSettings, names: Sequence[str], changes: Changes
) -> list[ExperimentSettings]:
    """The settings of the baselines, as far as they are known before the experiment has run: its
    tokens may be measured by then.

    Raises:
        UserError: a baseline is unknown; changes name one that does not run.
        UserErrors: what is wrong in the changes of one.
    """
    check_names(names, changes)
    tokens = settings.train.tokens
    return [baseline_settings(settings, name, tokens, changes.get(name, {})) for name in names]


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """ "seed=1", "star:mine.samples=8" as ["seed=1"], {"star": {"mine.samples": 8}}."""
    own: list[str] = []
    changes: dict[str, dict[str, Any]] = {}
    for override in overrides:
        name, colon, rest = override.partition(":")
        if colon and "=" not in name:
            changes.setdefault(name, {}).update([parse_override(rest)])
        else:
            own.append(override)
    return own, changes


def check_names(names: Sequence[str], changes: Changes) -> None:
    """Refuse an unknown baseline, and changes of one that is not run.

    Raises:
        UserError: the first mistake.
    """
    for name in (*names, *changes):
        if name not in BASELINES:
            raise UserError(
                "no such baseline", where=name, expected=f"one of {', '.join(BASELINES)}"
            )
    for name in changes:
        if name not in names:
            raise UserError("this baseline is not among those to run", where=f"--set {name}:…")


def row(run: Run) -> dict[str, str]:
    """A line of the table: win rates against the initial policy's first answers, and tokens."""
    history = [iteration_metrics(attempts) for attempts in run.done]
    method = method_of(run.settings)
    headline = method.headline
    best = max(range(len(history)), key=lambda t: history[t].get(headline, 0.0))
    return {
        "method": method.title(run.settings),
        "experiment": run.settings.experiment,
        "best iteration": f"{best}: {rate_text(history[best], headline)}",
        "last iteration": f"{len(history) - 1}: {rate_text(history[-1], headline)}",
        "generated tokens": _total(history, "generated_tokens"),
        "processed in training": _total(history, "train/tokens"),
        "trained tokens": _total(history, "train/trained_tokens"),
    }


def _run(settings: ExperimentSettings) -> list[Attempts]:
    with writing(settings.experiment, f"staple baselines ({settings.experiment})"):
        return run_experiment(settings)


def _trained_tokens(done: Sequence[Attempts]) -> int | None:
    """Tokens of one training, on average; None where nothing was trained."""
    trained = [
        attempts["train"].metrics["train/tokens"] for attempts in done if "train" in attempts
    ]
    return round(fmean(trained)) if trained else None


def _total(history: Sequence[Metrics], name: str) -> str:
    return f"{sum(metrics.get(name, 0.0) for metrics in history):,.0f}"
