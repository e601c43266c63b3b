"""An experiment opened for running: its settings, its record, its base model.

Flows and the CLI make one with `open_experiment`; it knows which attempt feeds which stage, and
which settings hold in which iteration: the experiment's, with what was changed for that one alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from constitutions.errors import UserError
from flows.settings import ExperimentSettings, dump_settings, load_settings, with_changes
from tasks.basemodels import BaseModelFiles, kept_model, resolve_model
from tasks.policies import PolicySource
from tasks.review import Verdict, recorded_verdict
from tasks.store import Attempt, Looker, Mode, Record, Slot

STAGES = ("prompts", "mine", "score", "filter", "cluster", "review", "train", "evaluate")
"""The stages of an iteration, in the method's order; iteration 0 has its own two."""
INITIAL_STAGES = ("prompts", "evaluate")
SKIPPED = {
    "staple": frozenset[str](),
    "star": frozenset({"cluster", "review"}),
    "sft": frozenset({"mine", "score", "filter", "cluster", "review"}),
}
"""The stages that a method does without."""

SETTINGS_FILE = "settings.yaml"
Place = tuple[int, str]
"""(iteration, stage)"""


@dataclass(frozen=True)
class Experiment:
    """What every flow of one experiment shares.

    `only` is the one stage to run, `start` the first to compute again: all before it are taken as
    the record has them. `force` computes again what the record has.
    """

    settings: ExperimentSettings
    record: Record
    force: bool = False
    only: Place | None = None
    start: Place | None = None
    look: Looker | None = None

    @cached_property
    def model(self) -> BaseModelFiles:
        """The base model; the planted one is fetched from the record, or made the first time."""
        if self.look:
            return kept_model(self.settings.policy, self.settings.seed, home(), self.record)
        return resolve_model(self.settings.policy, self.settings.seed, home(), self.record)

    @cached_property
    def _changes(self) -> dict[int, dict[str, Any]]:
        return self.record.all_changes()

    def settings_at(self, iteration: int) -> ExperimentSettings:
        """The settings that hold in an iteration."""
        return with_changes(self.settings, self._changes.get(iteration, {}))

    def slot(self, iteration: int) -> Slot:
        """Where an iteration's stages run."""
        mode = partial(self._mode, iteration)
        return Slot(self.record, iteration, self.settings.seed, mode, self.look)

    def _mode(self, iteration: int, stage: str) -> Mode:
        if self.only and (iteration, stage) != self.only:
            return "take"
        if self.start:
            order = _order((iteration, stage)) < _order(self.start)
            return "take" if order else "force"
        return "force" if self.force else "ask"

    def needs(self, stage: str, iteration: int) -> Attempt:
        """The current attempt of a stage; when one only looks, a placeholder where there is none.

        Raises:
            UserError: it was never finished.
        """
        if self.look:
            return self.look.attempt(stage, iteration)
        return self.record.needs(stage, iteration)

    def policy(self, iteration: int, t: int | None = None) -> PolicySource:
        """The policy that an iteration's training left, held as iteration `t` (or it) asks.

        Raises:
            UserError: the iteration was never trained.
        """
        settings = self.settings_at(iteration if t is None else t).policy
        initial = PolicySource(
            settings, self.model.path, self.model.digest, guided=self.settings.guided
        )
        return initial.trained(self.needs("train", iteration)) if iteration else initial

    def constitution(self, iteration: int) -> Attempt:
        """The attempt whose constitution an iteration trains on: reviewed, where that is asked."""
        reviewed = self.settings_at(iteration).review.enabled
        return self.needs("review" if reviewed else "cluster", iteration)

    def earlier_constitutions(self, iteration: int) -> dict[str, Attempt]:
        """The constitutions of all iterations before."""
        return {f"constitution_{t}": self.constitution(t) for t in range(1, iteration)}

    def verdict(self, iteration: int, clustered: Attempt) -> Verdict | None:
        """What a person decided on this very constitution; None: nobody was asked yet."""
        found = recorded_verdict(self.record, iteration, clustered)
        return found or (Verdict() if self.look else None)

    def references(self, iteration: int) -> dict[str, Attempt]:
        """What an iteration is evaluated against: held-out prompts, earlier policies' answers."""
        return {
            "held_out": self.needs("prompts", 0),
            "initial": self.needs("evaluate", 0),
            "previous": self.needs("evaluate", iteration - 1),
        }


def stages_of(iteration: int, method: str = "staple") -> tuple[str, ...]:
    """The stages that an iteration can have."""
    there = STAGES if iteration else INITIAL_STAGES
    return tuple(stage for stage in there if stage not in SKIPPED[method])


def home() -> Path:
    """Where partial work and made models are kept: $STAPLE_HOME, or .staple here."""
    return Path(os.environ.get("STAPLE_HOME", ".staple"))


def record_of(experiment: str) -> Record:
    """The record of an experiment, without its settings or model."""
    return Record(experiment, home())


def open_experiment(settings: ExperimentSettings, **how: Any) -> Experiment:
    """Open the record of an experiment; `how` as `Experiment` has it."""
    return Experiment(settings, record_of(settings.experiment), **how)


def note_settings(settings: ExperimentSettings, keep_changes: Sequence[str] | None = None) -> None:
    """Write the settings down as the experiment's own.

    Args:
        keep_changes: None drops what was changed for single iterations; else only the settings
            that are named here are the experiment's own again in every iteration.
    """
    record = record_of(settings.experiment)
    text = dump_settings(settings)
    if record.read_text(SETTINGS_FILE) != text:
        record.log_text(SETTINGS_FILE, text)
    for iteration, changes in record.all_changes().items():
        dropped = [name for name in changes if keep_changes is None or name in keep_changes]
        record.unchange(iteration, dropped)


def recorded_settings(experiment: str, overrides: Sequence[str] = ()) -> ExperimentSettings:
    """The settings that the experiment was last run with, changed by overrides.

    Raises:
        UserError: nothing was ever recorded under this name.
    """
    record = record_of(experiment)
    text = record.read_text(SETTINGS_FILE) if record.exists() else None
    if text is None:
        raise UserError(
            "nothing was ever recorded under this name",
            where=f"experiment {experiment}",
            fix=f"run: staple run PRESET --set experiment={experiment}",
        )
    return load_settings(f"experiment {experiment}", overrides, text=text)


def parse_place(place: str, iterations: int) -> Place:
    """ "cluster:2" as (2, "cluster"); without a number it is iteration 1.

    Raises:
        UserError: there is no such stage or iteration.
    """
    stage, _, number = place.partition(":")
    iteration = int(number) if number.isdigit() else 1
    wrong = number and not number.isdigit()
    if wrong or iteration > iterations or stage not in stages_of(iteration):
        raise UserError(
            "there is no such stage",
            where=place,
            expected=f"one of {', '.join(STAGES)}, and an iteration up to {iterations}, "
            "as in cluster:2",
        )
    return iteration, stage


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


def _order(place: Place) -> tuple[int, int]:
    iteration, stage = place
    return iteration, STAGES.index(stage)
