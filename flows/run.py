"""Run an experiment, and the SAMI experiment that its setting `then` describes.

The command line, the deployment and the baselines call `run_experiment`. Prefect, which takes
seconds to import, is imported only to compute something.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from flows.experiment import Place, is_noted, is_recorded, note_settings, writing
from flows.logs import logged
from flows.preflight import ask_server
from flows.publish import Attempts
from flows.schema import ExperimentSettings
from flows.server.prefect_server import running_server
from flows.settings import following
from flows.states import unchanged
from tasks.record import interruption
from tasks.record.record import Attempt


def finished_run(
    settings: ExperimentSettings, keep_changes: Sequence[str] | None = None
) -> list[Attempts] | None:
    """The attempts of every iteration if a run would write nothing, and so needs no lock.

    None if it would: also with `then`, which ends in a report.

    Args:
        keep_changes: as `note_settings` takes it.
    """
    if following(settings) or not is_recorded(settings.experiment):
        return None
    return unchanged(settings) if is_noted(settings, keep_changes) else None


def run_experiment(
    settings: ExperimentSettings,
    *,
    keep_changes: Sequence[str] | None = None,
    force: bool = False,
    start: Place | None = None,
    subflow: bool = True,
    resumed_by: str = "",
) -> list[Attempts]:
    """The attempts of every iteration: the recorded ones if nothing has changed, else computed.

    The caller holds the experiment's write lock.

    Args:
        keep_changes: as `note_settings` takes it.
        force: compute again what the record has.
        start: compute again from this stage on.
        subflow: False computes in the flow run of the caller, which a review can suspend.
        resumed_by: the command that continues the run, for the message of an interruption.

    Raises:
        UserError: the policy's endpoint or a stage says what is wrong.
    """
    note_settings(settings, keep_changes)
    if resumed_by:  # only now: what is not recorded cannot be resumed
        interruption.note(command=resumed_by)
    found = None if force or start else unchanged(settings)
    if found is not None:
        return found
    from prefect import tags

    from flows.loop import em_experiment

    ask_server(settings)
    with logged(settings.experiment), running_server(), tags(settings.experiment):
        return (em_experiment if subflow else em_experiment.fn)(settings, force, start)


class Followed(NamedTuple):
    """The second experiment, its attempts, and the report of both."""

    settings: ExperimentSettings
    done: list[Attempts]
    report: Path


def run_following(
    settings: ExperimentSettings,
    done: Sequence[Mapping[str, Attempt]],
    *,
    resume: bool = False,
    force: bool = False,
) -> Followed | None:
    """Run the experiment that `then` describes; None without one, or before a review.

    Args:
        resume: keep settings of single iterations.

    Raises:
        UserError: a setting in `then` is wrong.
    """
    then = following(settings)
    if then is None or (len(done) > 1 and "train" not in done[-1]):
        return None
    from flows.commands.report import write_report

    with writing(then.experiment, f"staple run {then.experiment}"), running_server():
        further = run_experiment(then, keep_changes=[] if resume else None, force=force)
        return Followed(then, further, write_report([settings.experiment, then.experiment]))
