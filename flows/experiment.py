"""An experiment opened for running: its settings, its record, its base model.

Flows and the CLI make one with `open_experiment`; it knows which attempt feeds which stage.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from constitutions.errors import UserError
from flows.settings import ExperimentSettings, dump_settings, load_settings
from tasks.basemodels import BaseModelFiles, resolve_model
from tasks.policies import PolicySource
from tasks.store import SUMMARY, Attempt, Record, Slot

STAGES = ("mine", "score", "filter", "cluster", "train", "evaluate")
"""The stages of an iteration, in the method's order (after `prompts`, its input)."""

SETTINGS_FILE = "settings.yaml"


@dataclass(frozen=True)
class Experiment:
    """What every flow of one experiment shares."""

    settings: ExperimentSettings
    record: Record
    model: BaseModelFiles
    force: bool = False

    def slot(self, iteration: int) -> Slot:
        """Where an iteration's stages run."""
        return Slot(self.record, iteration, self.settings.seed, self.force)

    def policy(self, iteration: int) -> PolicySource:
        """The policy that iteration's training left; 0 is the initial policy.

        Raises:
            UserError: the iteration was never trained.
        """
        initial = PolicySource(self.settings.policy, self.model.path, self.model.digest)
        return initial.trained(self.record.needs("train", iteration)) if iteration else initial

    def earlier_constitutions(self, iteration: int) -> dict[str, Attempt]:
        """The cluster attempts of all iterations before."""
        return {f"constitution_{t}": self.record.needs("cluster", t) for t in range(1, iteration)}

    def references(self, iteration: int) -> dict[str, Attempt]:
        """What an iteration is evaluated against: held-out prompts, earlier policies' answers."""
        return {
            "held_out": self.record.needs("prompts", 0),
            "initial": self.record.needs("evaluate", 0),
            "previous": self.record.needs("evaluate", iteration - 1),
        }


def home() -> Path:
    """Where partial work and made models are kept: $STAPLE_HOME, or .staple here."""
    return Path(os.environ.get("STAPLE_HOME", ".staple"))


def record_of(experiment: str) -> Record:
    """The record of an experiment, without its settings or model."""
    return Record(experiment, home())


def open_experiment(
    settings: ExperimentSettings, force: bool = False, note: bool = True
) -> Experiment:
    """Resolve the base model (the planted one is made the first time) and open the record.

    `note` writes the settings down as the experiment's own.
    """
    model = resolve_model(settings.policy, settings.seed, home())
    record = record_of(settings.experiment)
    if note:
        run_id = record.iteration_run(SUMMARY)
        record.client.log_text(run_id, dump_settings(settings), SETTINGS_FILE)
    return Experiment(settings, record, model, force)


def recorded_settings(experiment: str, overrides: Sequence[str] = ()) -> ExperimentSettings:
    """The settings that the experiment was last run with, changed by overrides.

    Raises:
        UserError: nothing was ever recorded under this name.
    """
    record = record_of(experiment)
    if not record.exists():
        raise UserError(
            "nothing was ever recorded under this name",
            where=f"experiment {experiment}",
            fix=f"run: staple run PRESET --set experiment={experiment}",
        )
    import mlflow

    path = mlflow.artifacts.download_artifacts(
        run_id=record.iteration_run(SUMMARY),
        artifact_path=SETTINGS_FILE,
        tracking_uri=record.tracking_uri,
    )
    return load_settings(path, overrides)


def newest(settings: ExperimentSettings, stage: str, iteration: int | None) -> Attempt:
    """The current attempt of a stage, of an iteration or of the newest that finished it.

    Raises:
        UserError: it was never finished.
    """
    record = record_of(settings.experiment)
    if iteration is not None:
        return record.needs(stage, iteration)
    for t in range(settings.iterations, 0, -1):
        if found := record.current(stage, t):
            return found
    return record.needs(stage, 1)
