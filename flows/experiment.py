"""An open experiment: its settings, its record, its base model.

Flows and the CLI make one with `open_experiment`. It knows which attempt feeds which stage, and the
settings of each iteration: the experiment's, with those changed for that iteration alone.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from constitutions.errors import UserError
from flows.methods import method_of
from flows.schema import NAME, ExperimentSettings
from flows.settings import (
    check_succession,
    dump_settings,
    load_settings,
    with_changes,
    without_gone,
)
from models.files import Damaged
from tasks.judging.champion import ChampionDecision
from tasks.policies.base import BaseModelFiles, kept_model, resolve_model
from tasks.policies.opening import PolicySource
from tasks.record.progress import say
from tasks.record.record import DECISION, Attempt, Attempts, Record
from tasks.record.slot import Looker, Mode, Slot
from tasks.record.writer import made
from tasks.record.writer import writing as hold
from tasks.review import ReviewDecision, ReviewSettings, recorded_verdict
from tasks.stages import STAGES

SETTINGS_FILE = "settings.yaml"
NAMES = "up to 100 letters, digits, dots, dashes and underscores"
PATIENCE = 2
"""Iterations in a row that do not become the champion, after which `iterations: auto` stops."""
Place = tuple[int, str]
"""(iteration, stage)"""


@dataclass(frozen=True)
class Experiment:
    """What every flow of one experiment shares.

    `only` is the one stage to run, `start` the first to compute again; the stages before come from
    the record. `force` computes again what the record has. `look` notes stages' states instead.
    """

    settings: ExperimentSettings
    record: Record
    force: bool = False
    only: Place | None = None
    start: Place | None = None
    look: Looker | None = None
    made: Attempts = field(default_factory=dict, compare=False, repr=False)
    """The attempts that this run uses, although another run may record newer ones."""

    @cached_property
    def model(self) -> BaseModelFiles:
        """The base model; a world's is fetched from the record, or pretrained the first time."""
        if self.look:
            return kept_model(self.settings.policy, self.settings.seed, home(), self.record)
        return resolve_model(self.settings.policy, self.settings.seed, home(), self.record)

    @cached_property
    def _changes(self) -> dict[int, dict[str, Any]]:
        found = self.record.all_changes()
        return {t: without_gone(changes) for t, changes in found.items()}

    def settings_at(self, iteration: int) -> ExperimentSettings:
        """The settings that hold in an iteration."""
        found = with_changes(self.settings, self._changes.get(iteration, {}))
        if found.review.which == "last" and iteration != found.last:
            return found.model_copy(update={"review": ReviewSettings()})
        return found

    def slot(self, iteration: int) -> Slot:
        """Where an iteration's stages run."""
        mode = partial(self._mode, iteration)
        return Slot(
            self.record,
            iteration,
            self.settings.seed,
            mode,
            self.look,
            made=self.made,
            shard_size=self.settings_at(iteration).shard_size,
            warm=partial(self._warm, iteration),
        )

    def _warm(self, iteration: int, stage: str) -> None:
        """Let UMAP compile itself, for half a minute in each process: it is no part of a stage."""
        if stage == "cluster" and self.settings_at(iteration).cluster.picture == "umap":
            import numpy as np

            from tasks.clustering.features import Features
            from tasks.clustering.picture import map_principles

            map_principles(Features(np.eye(8, dtype=np.float32), np.ones(8, bool)))

    def _mode(self, iteration: int, stage: str) -> Mode:
        if self.only and (iteration, stage) != self.only:
            return "take"
        if self.start:
            order = _order((iteration, stage)) < _order(self.start)
            return "take" if order else "force"
        return "force" if self.force else "reuse"

    def needs(self, stage: str, iteration: int) -> Attempt:
        """The attempt of a stage that this run uses, else the current one.

        With `look`, a placeholder if there is none.

        Raises:
            UserError: the stage is not finished.
        """
        if self.look:
            return self.look.attempt(stage, iteration)
        return self.slot(iteration).needs(stage, iteration)

    def policy(self, iteration: int, t: int | None = None) -> PolicySource:
        """The policy that an iteration trained, with the model settings of iteration `t` (or its).

        Raises:
            UserError: the iteration is not trained.
        """
        untaught = replace(
            self.untaught, settings=self.settings_at(iteration if t is None else t).policy
        )
        taught = self.taught()
        initial = replace(untaught, adapter=taught, taught=taught)
        if iteration:
            gated = self.settings_at(iteration).train.gate
            return initial.trained(self.needs("train", iteration), gated=gated)
        begun = self.before if t else None  # as a result of 0, nothing has trained it yet
        return initial.trained(begun.newest("train")) if begun else initial

    @property
    def untaught(self) -> PolicySource:
        """The base model itself."""
        method = method_of(self.settings)
        return PolicySource(
            self.settings_at(0).policy,
            self.model.path,
            self.model.digest,
            guided=method.guided,
            constitutional=method.constitutional,
        )

    def taught(self) -> Attempt | None:
        """The attempt that taught the initial policy, also before an experiment that this one
        continues; None where nothing was taught."""
        if self.before:
            return self.before.taught()
        return self.needs("teach", 0) if self.settings_at(0).teach.on else None

    @cached_property
    def before(self) -> Experiment | None:
        """The finished experiment that `after` names; None without one.

        Raises:
            UserError: it does not exist, has no constitution or no trained policy, or has another
                base model.
        """
        if not self.settings.after:
            return None
        settings = recorded_settings(self.settings.after)
        check_succession(settings, self.settings)
        found = open_experiment(settings, made=self.made)
        found.newest("train")
        return found

    def current(self, iteration: int) -> dict[str, Attempt]:
        """The current attempts of an iteration's stages, of those that are finished."""
        wanted = method_of(self.settings).asked(self.settings_at(iteration), iteration)
        found = {stage: self.record.current(stage, iteration) for stage in wanted}
        return {stage: attempt for stage, attempt in found.items() if attempt}

    def newest(self, stage: str) -> Attempt:
        """The attempt of the newest iteration that finished a stage, the same for the whole run.

        Raises:
            UserError: no iteration finished it.
        """
        key = self.settings.experiment, f"newest {stage}", 0
        if key not in self.made:
            self.made[key] = newest(self.settings, stage, None)
        return self.made[key]

    def discovered(self) -> Attempt | None:
        """The last constitution of the experiment that `after` names."""
        if self.before is None or self.settings_at(0).write.constitution:
            return None
        return self.before.constitution(self.before.newest("train").iteration)

    def writer(self) -> PolicySource:
        """The model that writes principles: `write.writer`, or the initial policy."""
        write = self.settings_at(0).write
        settings = None if write.constitution else write.writer
        if settings is None:
            return self.policy(0)
        find = kept_model if self.look else resolve_model
        model = find(settings, self.settings.seed, home(), self.record)
        return PolicySource(settings, model.path, model.digest, constitutional=True)

    def constitution(self, iteration: int) -> Attempt:
        """The attempt with the constitution that an iteration trains on: reviewed or clustered."""
        if method_of(self.settings).constitutional:
            return self.needs("write", 0)
        reviewed = self.settings_at(iteration).review.enabled
        return self.needs("review" if reviewed else "cluster", iteration)

    def earlier_constitutions(self, iteration: int) -> dict[str, Attempt]:
        """The constitutions of all earlier iterations."""
        return {f"constitution_{t}": self.constitution(t) for t in range(1, iteration)}

    def verdict(self, iteration: int, clustered: Attempt) -> ReviewDecision | None:
        """A person's decisions on exactly this constitution; None before a review."""
        found = recorded_verdict(self.record, iteration, clustered)
        return found or (ReviewDecision() if self.look else None)

    def references(self, iteration: int) -> dict[str, Attempt]:
        """Held-out prompts, and the answers of the initial and the previous policy to them; and of
        the champion, where it is another one."""
        found = {
            "held_out": self.needs("prompts", 0),
            "initial": self.needs("evaluate", 0),
            "previous": self.needs("evaluate", iteration - 1),
        }
        champion = self.champion(iteration)
        if champion not in (0, iteration - 1):
            found["champion"] = self.needs("evaluate", champion)
        return found

    def champion(self, iteration: int) -> int:
        """The iteration whose policy is the champion before this one; 0: the initial policy."""
        best = 0
        for t in range(1, iteration):
            if (found := self.decision(t, best)) and found.accepted:
                best = t
        return best

    def decision(self, iteration: int, champion: int) -> ChampionDecision | None:
        """Whether an iteration beat this champion; None where nobody has decided yet."""
        key = self.settings.experiment, "evaluate", iteration
        if self.look:
            text = self.look.attempt("evaluate", iteration).decision
        elif found := self.made.get(key) or self.record.current("evaluate", iteration):
            text = self.record.reader.run(found.run_id).tags.get(DECISION, "")  # not as it was made
        else:
            text = ""
        decided = ChampionDecision.read(text)
        return decided if decided and decided.champion == champion else None

    def stops(self, iteration: int) -> bool:
        """Whether an experiment with `iterations: auto` ends with this iteration: `PATIENCE` in a
        row did not become the champion."""
        if self.settings.iterations != "auto" or iteration < PATIENCE:
            return False
        best = self.champion(iteration + 1)
        last = (self.decision(t, best) for t in range(iteration - PATIENCE + 1, iteration + 1))
        return all(found is not None and not found.accepted for found in last)


def home() -> Path:
    """The folder of partial work and pretrained models: $STAPLE_HOME, or .staple here."""
    return Path(os.environ.get("STAPLE_HOME", ".staple"))


def record_of(experiment: str) -> Record:
    """The record of an experiment, without its settings or model."""
    return Record(experiment, home())


def open_experiment(settings: ExperimentSettings, **how: Any) -> Experiment:
    """Open the record of an experiment; `how` as `Experiment` has it."""
    record = record_of(settings.experiment)
    return Experiment(settings, record, **{"made": made(record), **how})


def writing(experiment: str, command: str) -> AbstractContextManager[None]:
    """Hold an experiment's write lock, as `tasks.record.writer.writing`."""
    return hold(record_of(experiment), command)


def note_settings(settings: ExperimentSettings, keep_changes: Sequence[str] | None = None) -> None:
    """Record the settings as the experiment's.

    Args:
        keep_changes: None drops all settings of single iterations; else only those named here are
            dropped.
    """
    record = record_of(settings.experiment)
    text = dump_settings(settings)
    try:
        unchanged = record.read_text(SETTINGS_FILE) == text
    except Damaged as error:
        say(f"{error}; it is written again")
        unchanged = False
    if not unchanged:
        record.log_text(SETTINGS_FILE, text)
    for iteration, dropped in _dropped(record, keep_changes).items():
        record.unchange(iteration, dropped)


def is_noted(settings: ExperimentSettings, keep_changes: Sequence[str] | None = None) -> bool:
    """Whether `note_settings` would change nothing."""
    record = record_of(settings.experiment)
    with suppress(Damaged):
        same = record.read_text(SETTINGS_FILE) == dump_settings(settings)
        return same and not any(_dropped(record, keep_changes).values())
    return False


def _dropped(record: Record, keep_changes: Sequence[str] | None) -> dict[int, list[str]]:
    """Iteration → the settings of its own that a run drops."""
    return {
        iteration: [name for name in changes if keep_changes is None or name in keep_changes]
        for iteration, changes in record.all_changes().items()
    }


def recorded_settings(experiment: str, overrides: Sequence[str] = ()) -> ExperimentSettings:
    """The settings of the experiment's last run, changed by overrides.

    Raises:
        UserError: the record has no such experiment, or its settings are damaged or wrong.
    """
    try:
        text = record_of(experiment).read_text(SETTINGS_FILE) if is_recorded(experiment) else None
    except Damaged as error:
        raise UserError(
            error.what,
            where=error.where,
            expected="the settings as they were recorded",
            fix="restore the file, or write it again by running the experiment with its settings: "
            f"staple run FILE --set experiment={experiment}",
        ) from error
    if text is None:
        raise _unknown(experiment)
    return load_settings(f"experiment {experiment}", overrides, text=text, recorded=True)


def _unknown(experiment: str) -> UserError:
    """The error about a name under which nothing is recorded, with the names that are near it."""
    if not re.fullmatch(NAME, experiment):
        fix, expected = "", NAMES
    elif close := difflib.get_close_matches(
        experiment, (name for name in recorded_names() if name != experiment), n=1
    ):
        fix, expected = f"did you mean '{close[0]}'?", ""
    else:
        fix, expected = f"run: staple run PRESET --set experiment={experiment}", ""
    what, where = "nothing is recorded under this name", f"experiment {experiment}"
    return UserError(what, where=where, expected=expected, fix=fix)


def recorded_names() -> list[str]:
    """The names of all experiments that this project recorded, the newest last."""
    names = record_of("staple").neighbours()
    return [name for name in names if is_recorded(name) and record_of(name).runs(kind="summary")]


def is_recorded(experiment: str) -> bool:
    """Whether the record has an experiment of this name; no if the name is not valid."""
    return bool(re.fullmatch(NAME, experiment)) and record_of(experiment).exists()


def parse_place(place: str, settings: ExperimentSettings) -> Place:
    """ "cluster:2" as (2, "cluster"). Without a number: iteration 1, or 0 for a stage of 0 alone.

    Raises:
        UserError: there is no such stage or iteration.
    """
    stage, _, number = place.partition(":")
    counted = re.fullmatch(r"[0-9]{1,4}", number)
    last, method = settings.last, method_of(settings)
    iteration = int(number) if counted else int(stage in method.stages(1))
    wrong = number and not counted
    if wrong or iteration > last or stage not in method.stages(iteration):
        there = ", ".join(method.all_stages)
        raise UserError(
            "there is no such stage",
            where=place,
            expected=f"one of {there}, and an iteration up to {last}, as in train:2",
        )
    return iteration, stage


def check_discovers(settings: ExperimentSettings) -> None:
    """Refuse an experiment that discovers no constitution.

    Raises:
        UserError: its method does not.
    """
    method = method_of(settings)
    if not method.guided:
        raise UserError(
            f"method {method.name} discovers no constitution",
            where=f"experiment {settings.experiment}",
            expected="an experiment with method: staple",
            fix="change SAMI's constitution with write.constitution: a name or a file"
            if method.constitutional
            else "",
        )


def newest(settings: ExperimentSettings, stage: str, iteration: int | None) -> Attempt:
    """The current attempt of a stage, in an iteration or in the newest that finished it.

    Raises:
        UserError: the stage is not finished, or there is no such iteration.
    """
    record = record_of(settings.experiment)
    if iteration is not None and iteration > settings.last:
        raise UserError(
            f"there is no iteration {iteration}",
            where=f"experiment {settings.experiment}",
            expected=f"at most {settings.last}",
        )
    if iteration is not None:
        return record.needs(stage, iteration)
    for t in range(settings.last, 0, -1):
        if found := record.current(stage, t):
            return found
    return record.needs(stage, 1)


def _order(place: Place) -> tuple[int, int]:
    iteration, stage = place
    return iteration, list(STAGES).index(stage)
