"""One stage alone, as `staple stage` and Prefect's UI run it.

It reads the current outputs of earlier stages and records a new attempt. Later stages become stale,
and are not computed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from prefect import flow, tags

from constitutions.errors import UserError, UserErrors
from flows.announce import announced_steps
from flows.experiment import (
    Experiment,
    open_experiment,
    record_of,
    recorded_settings,
    writing,
)
from flows.logs import logged
from flows.loop import publish
from flows.methods import method_of
from flows.schema import ExperimentSettings
from flows.server.prefect_server import running_server
from flows.settings import with_changes, with_templates, without_gone
from flows.states import stage_states
from tasks.record.record import Attempt

LONGEST_TAG = 8_000
"""Characters that MLflow keeps of a tag."""


def run_stage(
    experiment: str,
    stage: str,
    iteration: int,
    changes: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Attempt:
    """Run one stage of one iteration on the recorded outputs of the stages before it.

    It waits while another run writes the experiment.

    Args:
        changes: settings of this iteration from now on: "cluster.max_principles" → 8.
        force: compute again what the record has.

    Raises:
        UserError: no such experiment, stage or setting; a stage before it is not finished.
    """
    _check_place(recorded_settings(experiment), stage, iteration)
    _check_changes(stage, changes or {})
    where = f"--experiment {experiment} --iteration {iteration}"
    with writing(experiment, f"staple stage {stage} {where}"):
        return _run_stage(experiment, stage, iteration, changes, force)


def _run_stage(
    experiment: str, stage: str, iteration: int, changes: Mapping[str, Any] | None, force: bool
) -> Attempt:
    settings = recorded_settings(experiment)  # under the lock, nobody else changes them
    if changes:
        record = record_of(experiment)
        before = without_gone(record.changes(iteration))
        with_changes(settings, {**before, **changes})  # raises on a mistake
        record.change(iteration, _to_record(changes))
    state = stage_states(settings, iteration).get((stage, iteration))
    if state is None and stage == "teach":
        raise UserError(
            "no skills are taught",
            where=f"experiment {experiment}",
            fix=f"staple run {experiment} --resume --set teach.examples=NUMBER",
        )
    if state is None:
        raise UserError(
            f"iteration {iteration} trains without a review of its constitution",
            where=f"experiment {experiment}",
            fix=f"staple constitution edit {experiment} --iteration {iteration}",
        )
    if state.standing == "finished" and state.attempt and not force:
        return state.attempt
    names = (experiment, f"iteration {iteration}", stage)
    with logged(experiment), running_server(), tags(*names):
        return one_stage(settings, stage, iteration, force)


@flow(name="stage", flow_run_name="{settings.experiment} {stage} {iteration}")
def one_stage(
    settings: ExperimentSettings, stage: str, iteration: int, force: bool = False
) -> Attempt:
    """Run a stage that is not finished.

    Raises:
        UserError: the constitution has no review yet.
    """
    experiment = open_experiment(settings, force=force, only=(iteration, stage))
    for attempt in announced_steps(experiment, iteration):
        if attempt.stage == stage:
            _publish_if_whole(experiment, iteration)
            return attempt
    raise UserError(
        f"nobody has reviewed the constitution of iteration {iteration} yet",
        where=f"experiment {settings.experiment}",
        fix=f"staple constitution edit {settings.experiment} --iteration {iteration}",
    )


def _to_record(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes as an iteration's tags hold them, with the turns of a file of templates.

    Raises:
        UserError: the turns are too long for a tag.
    """
    kept, _ = with_templates(changes, "")
    for name, value in kept.items():
        if len(json.dumps(value)) > LONGEST_TAG:
            raise UserError(
                f"an iteration's own value has at most {LONGEST_TAG:,} characters",
                where=f"setting '{name}'",
                fix=f"set it for all iterations: staple run EXPERIMENT --resume --set {name}=…",
            )
    return kept


def _publish_if_whole(experiment: Experiment, iteration: int) -> None:
    """Publish the iteration once all its stages are finished and none is stale."""
    states = stage_states(experiment.settings, iteration)
    mine = {stage: s.attempt for (stage, t), s in states.items() if t == iteration}
    attempts = {stage: attempt for stage, attempt in mine.items() if attempt}
    whole = all(s.standing == "finished" for (_, t), s in states.items() if t == iteration)
    if whole:
        publish(experiment, iteration, attempts)


def _check_place(settings: ExperimentSettings, stage: str, iteration: int) -> None:
    there = method_of(settings).stages(iteration)
    if stage not in there:
        raise UserError(
            f"iteration {iteration} has no stage '{stage}'",
            expected=f"one of {', '.join(there)}",
        )
    if iteration > settings.last:
        raise UserError(
            f"there is no iteration {iteration}",
            where=f"experiment {settings.experiment}",
            expected=f"at most {settings.last}",
            fix=f"staple run {settings.experiment} --resume --set iterations={iteration}",
        )


SHARED = ("policy.model", "policy.revision", "prompts")
"""Settings, or parts of them, that hold for all iterations: an adapter belongs to one model, and
iterations with prompts of their own sizes would mine each other's, and held-out ones."""


def _check_changes(stage: str, changes: Mapping[str, Any]) -> None:
    """Refuse changes of settings that the stage does not read, or that all iterations share."""
    own = {stage, "policy", "shard_size"} | ({"score"} if stage == "evaluate" else set())
    others = {name for name in changes if name.partition(".")[0] not in own}
    shared = {n for n in changes if any(f"{n}.".startswith(f"{part}.") for part in SHARED)}
    wrong = [
        UserError(
            f"stage '{stage}' does not read this setting"
            if name in others
            else "it is the same in every iteration",
            where=f"setting '{name}'",
            expected=f"a setting of {', '.join(sorted(own))}" if name in others else "",
            fix=f"for every iteration: staple run EXPERIMENT --resume --set {name}=…",
        )
        for name in changes
        if name in others | shared
    ]
    if wrong:
        raise UserErrors(wrong)
