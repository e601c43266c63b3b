"""`staple report`: experiments as one HTML file; the table in Prefect, the figures in MLflow.

It reads the record and computes nothing again.
"""

from __future__ import annotations

import errno
import platform
import re
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

from constitutions.errors import UserError
from flows.commands.listing import overview
from flows.commands.output import check_output, unwritable
from flows.experiment import record_of, recorded_settings
from flows.methods import method_of
from flows.publish import log_figures
from flows.schema import ExperimentSettings
from flows.settings import dump_settings
from models.files import write_text
from tasks.prompts import PromptSettings
from tasks.record.record import Attempt, finished
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
    from prefect import flow

    from flows.server.prefect_server import running_server

    with running_server():
        return flow(name="report", flow_run_name="report of {experiments}")(report)(names, path)


def report(experiments: list[str], out: Path) -> Path:
    """Write the file, the figures and the artifact, as `write_report` checked.

    Raises:
        UserError: the file cannot be written.
    """
    from prefect.artifacts import create_table_artifact

    recorded = [gather(recorded_settings(name)) for name in experiments]
    text = page(recorded, packages(), written=f"{date.today():%-d %B %Y}")
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
    """All that the record has of an experiment.

    Where the states cannot be checked (the base model is gone), all finished stages.
    """
    method, found = method_of(settings), overview(settings)
    attempts: dict[int, dict[str, Attempt]] = {}
    for (stage, t), state in found.states.items():
        if state.attempt:
            attempts.setdefault(t, {})[stage] = state.attempt
    return Recorded(
        name=settings.experiment,
        method=method.title(settings),
        about=method.about,
        model=settings.policy.model,
        data=_data(settings.prompts),
        found=found.headline,
        caveat=_caveat(settings),
        first_answers=method.first_answers(settings),
        headline=method.headline,
        settings=dump_settings(settings),
        seed=settings.seed,
        iterations=settings.last,
        outdated=found.outdated,
        stages=[
            RecordedStage(
                *place,
                "not checked" if found.problem else state.standing,
                found.problem or "; ".join(state.since),
                state.attempt,
            )
            for place, state in found.states.items()
        ],
        attempts=attempts,
        history=found.history,
        changes=record_of(settings.experiment).all_changes(),
    )


def _data(prompts: PromptSettings) -> str:
    if prompts.world:
        return f"the embedded world “{prompts.world.name}”"
    return ", ".join(corpus.label for corpus in prompts.corpora)


def _caveat(settings: ExperimentSettings) -> str:
    judge = settings.evaluate.judge.on(settings.prompts.oracle)
    if judge.needs_oracle:
        about = "is the oracle of an embedded world: it knows the rules that the model has to find"
    elif judge.needs_gold:
        about = "prefers the answer that is nearer to the gold answer, whatever it says"
    else:
        about = "is a model, which may prefer a length or a style"
    return (
        f"The judge {about}; and this is one seed, whose interval covers the draw of the held-out "
        "prompts alone."
    )


def packages() -> dict[str, str]:
    """The project, Python and what it depends on: name → version, as installed here."""
    required = metadata.requires(PACKAGE) or []
    names = [re.split(r"[^\w.-]", line)[0] for line in required if "extra ==" not in line]
    versions = {name: metadata.version(name) for name in sorted(names)}
    return {"staple": metadata.version(PACKAGE), "Python": platform.python_version(), **versions}


def _check_begun(settings: ExperimentSettings) -> None:
    if not any(map(finished, record_of(settings.experiment).runs(kind="stage"))):
        raise UserError(
            "no stage of it is finished",
            where=f"experiment {settings.experiment}",
            fix=f"run: staple run {settings.experiment} --resume",
        )


def _default(names: Sequence[str]) -> Path:
    """A file's name may have 255 bytes, an experiment's 100."""
    others = f"-and-{len(names) - 1}-more" if len(names) > 2 else "-".join(["", *names[1:]])
    return Path(f"report-{names[0]}{others}.html")
