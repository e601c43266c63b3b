"""`staple report`: experiments as one HTML file; the table in Prefect, the figures in MLflow.

It reads the record and computes nothing again.
"""

from __future__ import annotations

import errno
import platform
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_table_artifact

from constitutions.errors import UserError
from flows.commands.output import check_output, unwritable
from flows.experiment import record_of, recorded_settings
from flows.methods import method_of
from flows.publish import Attempts, iteration_metrics, log_figures
from flows.schema import ExperimentSettings
from flows.server.prefect_server import running_server
from flows.settings import dump_settings
from flows.states import stage_states
from models.files import write_text
from tasks.record.record import Attempt
from tasks.report.document import page, table
from tasks.report.recorded import Recorded, RecordedStage

PACKAGE = "staple-em"
"""The distribution whose dependencies are listed."""


def write_report(experiments: Sequence[str], out: Path | None = None) -> Path:
    """Write the report of some experiments, and return its path.

    Args:
        out: the HTML file; by default report-<experiments>.html in the working directory.

    Raises:
        UserError: there is no such experiment, one has no finished stage, or the file cannot be
            written.
    """
    names = list(dict.fromkeys(experiments))
    for name in names:
        _check_begun(recorded_settings(name))
    path = out or _default(names)
    check_output(path)
    with running_server():
        return report(names, path)


@flow(name="report", flow_run_name="report of {experiments}")
def report(experiments: list[str], out: Path) -> Path:
    """Write the file, the figures and the artifact, as `write_report` checked.

    Raises:
        UserError: the file cannot be written.
    """
    recorded = [gather(recorded_settings(name)) for name in experiments]
    text = page(recorded, packages())
    try:
        write_text(out, text)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # a full disk, which is reported as an outage
        raise unwritable(out, error.strerror or str(error)) from None
    for e in recorded:
        log_figures(record_of(e.name), e.history, constitutional=e.constitutional)
    if rows := table(recorded):
        create_table_artifact(
            table=rows,
            key="results",
            description=f"Methods by benchmarks, 95 % intervals; the report: {out.name}",
        )
    return out


def gather(settings: ExperimentSettings) -> Recorded:
    """All that the record has of an experiment."""
    method, stages = method_of(settings), _stages(settings)
    attempts: defaultdict[int, Attempts] = defaultdict(dict)
    for stage in stages:
        if stage.attempt:
            attempts[stage.iteration][stage.name] = stage.attempt
    return Recorded(
        name=settings.experiment,
        method=method.title(settings),
        headline=method.headline,
        settings=dump_settings(settings),
        seed=settings.seed,
        iterations=settings.iterations,
        stages=stages,
        attempts=dict(attempts),
        history={t: iteration_metrics(found) for t, found in attempts.items()},
        changes=record_of(settings.experiment).all_changes(),
    )


def packages() -> dict[str, str]:
    """Python and what the project depends on: name → version, as installed here."""
    try:
        required = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        required = []
    names = [re.split(r"[^\w.-]", line)[0] for line in required if "extra ==" not in line]
    return {"Python": platform.python_version()} | {n: metadata.version(n) for n in sorted(names)}


def _stages(settings: ExperimentSettings) -> list[RecordedStage]:
    """Every stage that the settings ask for, in the loop's order.

    Where the states cannot be checked (the base model is gone), all finished stages.
    """
    try:
        states = stage_states(settings)
    except UserError as error:
        return [
            RecordedStage(*place, "not checked", str(error), a) for place, a in _current(settings)
        ]
    return [
        RecordedStage(*place, state.standing, "; ".join(state.since), state.attempt)
        for place, state in states.items()
    ]


def _current(settings: ExperimentSettings) -> Iterator[tuple[tuple[str, int], Attempt]]:
    """(stage, iteration) and its current attempt, in the loop's order."""
    record = record_of(settings.experiment)
    for t in range(settings.iterations + 1):
        for stage in method_of(settings).stages(t):
            if attempt := record.current(stage, t):
                yield (stage, t), attempt


def _check_begun(settings: ExperimentSettings) -> None:
    if next(_current(settings), None) is None:
        raise UserError(
            "no stage of it is finished",
            where=f"experiment {settings.experiment}",
            fix=f"run: staple run {settings.experiment} --resume",
        )


def _default(names: Sequence[str]) -> Path:
    """A file's name may have 255 bytes, an experiment's 100."""
    others = f"-and-{len(names) - 1}-more" if len(names) > 2 else "-".join(["", *names[1:]])
    return Path(f"report-{names[0]}{others}.html")
