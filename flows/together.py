"""An experiment and the SAMI experiment that its setting `then` describes, with one report of both.

`staple run` and the deployment call `run_following` after the first experiment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from flows.commands.report import write_report
from flows.em import em_experiment
from flows.experiment import note_settings, writing
from flows.publish import Attempts
from flows.schema import ExperimentSettings
from flows.server.prefect_server import running_server
from flows.settings import following
from flows.states import unchanged
from tasks.record.record import Attempt


class Followed(NamedTuple):
    """The second experiment, its attempts, and the report of both."""

    settings: ExperimentSettings
    done: list[Attempts]
    report: Path

    @property
    def computed(self) -> bool:
        """Whether any stage was computed."""
        return not all(a.reused for attempts in self.done for a in attempts.values())


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
    with writing(then.experiment, f"staple run {then.experiment}"):
        note_settings(then, [] if resume else None)
        found = None if force else unchanged(then)
        with running_server():
            further = em_experiment(then, force) if found is None else found
            return Followed(then, further, write_report([settings.experiment, then.experiment]))
