"""The record: what every stage read and wrote, kept in MLflow.

One MLflow experiment per experiment, one top-level run per iteration, one nested run per attempt of
a stage. `tasks.record.slot` makes attempts; flows and the CLI read `Record.current`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from constitutions.errors import UserError
from models.files import UNREADABLE, remove, seal, unseal, write_text
from tasks.record import locks
from tasks.record.artifacts import Artifacts
from tasks.record.connection import RecordConnection
from tasks.record.provenance import Acceptance, Provenance, Source
from tasks.record.runs import MlflowRun
from tasks.record.tables import StoredRows
from tasks.record.work import Metrics

Row = TypeVar("Row")

PROVENANCE = "derivation.json"
LAST_USED = "asked"
"""Tag: when an attempt began, ended or was reused. The newest is the current one."""
HEARTBEAT = "heartbeat"
"""Tag of a running attempt: the wall-clock time at which its process was last alive."""
CHANGE = "set."
"""Tags of an iteration's run: settings that were changed for this iteration alone, as JSON."""
INPUT = "input."
"""Tags of an attempt: what it read, by name."""
ACCEPTED = "accepted."
"""Tags of an attempt: further fingerprints that it stands for, and who accepted them, as JSON."""
DECISION = "decision"
"""Tag of an attempt at evaluate: whether its policy became the champion."""
SUMMARY = -1
"""The iteration number under which the experiment's own summary run is kept."""
AttemptKey = tuple[str, str, int]
"""(experiment, stage, iteration)"""


@dataclass(frozen=True)
class Attempt:
    """A finished attempt of a stage: a reference to what it wrote, never the data itself."""

    stage: str
    iteration: int
    run_id: str
    fingerprint: str
    digest: str
    """sha256 over the manifest: what a successor's fingerprint depends on."""
    inputs: Mapping[str, Source]
    """Input name → what was read."""
    metrics: Metrics
    seconds: float
    reused: bool
    record: Record = field(repr=False, compare=False)
    accepted: Mapping[str, Acceptance] = field(default_factory=dict)
    """Fingerprint, after a change of code → who accepted the attempt for it."""
    decision: str = field(default="", compare=False)
    """The tag `DECISION`, as it was when the attempt was read."""

    @property
    def key(self) -> AttemptKey:
        """(experiment, stage, iteration)."""
        return self.record.experiment, self.stage, self.iteration

    def stands_for(self, fingerprint: str) -> bool:
        """Whether its outputs are those of a stage with this fingerprint."""
        return fingerprint == self.fingerprint or fingerprint in self.accepted

    def path(self, name: str) -> Path:
        """Local path of an output file or folder, fetched when the store is remote.

        Raises:
            UserError: a file is not what the attempt wrote.
        """
        return self.record.artifacts.verified(self.run_id, name, self.digest)

    def rows(self, name: str, row_type: type[Row]) -> StoredRows[Row]:
        """The rows of the table `name`, read from the disk each time they are asked for.

        Raises:
            UserError: a file is not what the attempt wrote.
        """
        return StoredRows.at(self.path(f"{name}.parquet"), row_type)

    def read(self, name: str, row_type: type[Row]) -> list[Row]:
        """The rows of the table `name`, all at once; raises as `rows`."""
        return list(self.rows(name, row_type))

    def source(self, name: str, current: Attempt) -> Attempt:
        """What it read under a name: the current attempt, or an older one that the record keeps.

        Args:
            current: also where it read nothing under that name.

        Raises:
            UserError: the record no longer has it.
        """
        read = self.inputs.get(name)
        if read is None or read.digest == current.digest:
            return current
        for attempt in self.record.attempts(read.stage, read.iteration):
            if attempt.digest == read.digest:
                return attempt
        raise UserError(
            f"the record no longer has the attempt at stage '{read.stage}' that "
            f"stage '{self.stage}' read",
            where=f"iteration {self.iteration} of experiment {self.record.experiment}",
            fix=f"staple stage {self.stage} --experiment {self.record.experiment} "
            f"--iteration {self.iteration}",
        )

    def provenance(self) -> Provenance:
        """What its outputs depend on.

        Raises:
            UserError: the file that says so is damaged.
        """
        path = self.record.artifacts.path(self.run_id, PROVENANCE)
        with suppress(*UNREADABLE):
            found = Provenance.read(path.read_bytes())
            if found.fingerprint == self.fingerprint and found.inputs == self.inputs:
                return found
        raise self.record.artifacts.damage(self.run_id, PROVENANCE, path)


Attempts = dict[AttemptKey, Attempt]
"""What a run of the loop has made or reused so far."""


class Record(RecordConnection):
    """An experiment's runs in MLflow, and their files."""

    @cached_property
    def artifacts(self) -> Artifacts:
        """The files of its runs."""
        return Artifacts(self, self.home / "cache")

    # The experiment and its iterations ------------------------------------------------------

    def iteration_run(self, iteration: int) -> str:
        """The run id of an iteration's top-level run (SUMMARY: the experiment's), made once."""
        kind = "summary" if iteration == SUMMARY else "iteration"
        found = self.runs(kind=kind, iteration=iteration)
        if found:
            return found[-1].run_id  # the first that was made, should there be two
        name = "summary" if iteration == SUMMARY else f"iteration {iteration}"
        tags = {"kind": kind, "iteration": str(iteration), LAST_USED: self.stamp()}
        run = self.client.create_run(self.experiment_id, tags=tags, run_name=name)
        self.client.set_terminated(run.info.run_id)
        return str(run.info.run_id)

    def log_iteration(
        self, iteration: int, metrics: Metrics, files: Iterable[Path] = (), model: str = ""
    ) -> None:
        """Headline metrics (at step = iteration) and files of an iteration's top-level run.

        Args:
            model: the id of the logged model that the metrics are about.
        """
        run_id = self.iteration_run(iteration)
        self.log_metrics(run_id, metrics, step=max(iteration, 0), model=model)
        for path in files:
            if path.is_dir():
                self.client.log_artifacts(run_id, str(path), path.name)
            else:
                self.client.log_artifact(run_id, str(path))

    def took(self, run_id: str, seconds: float) -> None:
        """Let a run have this duration: the top-level runs are closed when they are made."""
        began = self.reader.run(run_id).start_time
        self.client.set_terminated(run_id, end_time=began + round(1000 * seconds))

    def log_metrics(self, run_id: str, metrics: Metrics, step: int, model: str = "") -> None:
        """Metrics in one call; a value that MLflow could not draw (NaN) is our defect."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [
            Metric(k, float(v), now, step, model_id=model or None) for k, v in metrics.items()
        ]
        for start in range(0, len(points), 1000):
            self.client.log_batch(run_id, metrics=points[start : start + 1000])

    def log_text(self, name: str, text: str) -> None:
        """A text file of the experiment itself, which carries its digest in its first line."""
        run_id, sealed = self.iteration_run(SUMMARY), seal(text)
        folder = self.artifacts.folder(run_id)
        if folder is None:
            self.client.log_text(run_id, sealed, name)
        else:  # whole or not at all, where the store leaves that to us
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / name).is_dir():
                remove(folder / name)
            write_text(folder / name, sealed)

    def read_text(self, name: str) -> str | None:
        """A text file of the experiment itself; None where there is none.

        Raises:
            Damaged: it is not what was written.
        """
        run_id = self.iteration_run(SUMMARY)
        folder = self.artifacts.folder(run_id)
        if folder is not None:
            there = (folder / name).exists()
        else:
            there = any(file.path == name for file in self.client.list_artifacts(run_id))
        if not there:
            return None
        return unseal(self.artifacts.newest(run_id, name))

    def fetch_folder(self, name: str) -> Path:
        """A folder of the experiment itself, in the home's cache where the store is remote."""
        return self.artifacts.path(self.iteration_run(SUMMARY), name)

    def changes(self, iteration: int) -> dict[str, Any]:
        """Settings that were changed for one iteration: "cluster.max_principles" → value."""
        return self.all_changes().get(iteration, {})

    def all_changes(self) -> dict[int, dict[str, Any]]:
        """`changes` of every iteration that has any."""
        changed = {
            int(run.tags["iteration"]): _tags(run, CHANGE) for run in self.runs(kind="iteration")
        }
        return {
            iteration: {name: json.loads(value) for name, value in tags.items()}
            for iteration, tags in changed.items()
            if tags
        }

    def change(self, iteration: int, settings: Mapping[str, Any]) -> None:
        """Change settings for one iteration, from now on; a value of None is a value."""
        run_id = self.iteration_run(iteration)
        for name, value in settings.items():
            self.client.set_tag(run_id, CHANGE + name, json.dumps(value))

    def unchange(self, iteration: int, names: Iterable[str]) -> None:
        """The named settings are the experiment's own again."""
        run_id = self.iteration_run(iteration)
        for name in names:
            self.client.delete_tag(run_id, CHANGE + name)

    # Attempts -------------------------------------------------------------------------------

    def current(self, stage: str, iteration: int) -> Attempt | None:
        """The newest finished attempt of a stage, or None."""
        found = self.attempts(stage, iteration)
        return found[0] if found else None

    def needs(self, stage: str, iteration: int) -> Attempt:
        """As `current`.

        Raises:
            UserError: it was never finished; the message says how to make it.
        """
        found = self.current(stage, iteration)
        if found is None:
            raise UserError(
                f"stage '{stage}' of iteration {iteration} was never finished",
                where=f"experiment {self.experiment}",
                expected="its outputs in the record",
                fix=f"run: staple stage {stage} --experiment {self.experiment} "
                f"--iteration {iteration}",
            )
        return found

    def attempts(self, stage: str, iteration: int) -> list[Attempt]:
        """Finished attempts of a stage, the newest first."""
        found = self.runs(kind="stage", stage=stage, iteration=iteration)
        return [self.attempt(run) for run in found if finished(run)]

    def attempt(self, run: MlflowRun, *, reused: bool = True) -> Attempt:
        """A finished MLflow run as an attempt."""
        tags, accepted = run.tags, _tags(run, ACCEPTED)
        return Attempt(
            stage=tags["stage"],
            iteration=int(tags["iteration"]),
            run_id=run.run_id,
            fingerprint=tags["fingerprint"],
            digest=tags["digest"],
            inputs={name: Source.read(tag) for name, tag in _tags(run, INPUT).items()},
            metrics=dict(run.metrics),
            seconds=float(tags["seconds"]),
            reused=reused,
            record=self,
            accepted={name: by for name, tag in accepted.items() if (by := Acceptance.read(tag))},
            decision=tags.get(DECISION, ""),
        )

    def make_current(self, attempt: Attempt) -> None:
        """Make an older attempt the current one again, because it is reused."""
        self.client.set_tag(attempt.run_id, LAST_USED, self.stamp())

    def accept(self, attempt: Attempt, fingerprint: str, by: str, modules: Iterable[str]) -> None:
        """Let an attempt stand for another fingerprint, from which only its code differs."""
        when = datetime.now(UTC).isoformat(timespec="seconds")
        accepted = json.dumps(Acceptance(by, when, list(modules))._asdict())
        self.client.set_tag(attempt.run_id, ACCEPTED + fingerprint, accepted)

    def runs(self, **tags: object) -> list[MlflowRun]:
        """The experiment's MLflow runs that have these tags, the newest by LAST_USED first."""
        found = self.reader.runs(self.experiment_id, {n: str(tag) for n, tag in tags.items()})
        return sorted(found, key=lambda run: run.tags.get(LAST_USED, ""), reverse=True)

    def is_alive(self, run: MlflowRun) -> bool:
        """Whether the process behind a RUNNING attempt still works on it.

        Here its lock shows that; on another machine its heartbeat does, by this machine's clock.
        """
        tags = run.tags
        if run.status != "RUNNING":
            return False
        if tags.get("place") == locks.place(self.home):
            return locks.is_held(self.lock(tags["fingerprint"]))
        late = abs(time.time() - float(tags.get(HEARTBEAT, 0)))
        return late < locks.BEATS_MISSED * locks.HEARTBEAT_SECONDS

    def lock(self, fingerprint: str) -> Path:
        """The lock of what has this fingerprint; its working folder lies beside it."""
        return self.home / "work" / f"{fingerprint}.lock"

    def stamp(self) -> str:
        """The time in nanoseconds, sortable as text, and later than every earlier stamp even if the
        clock was set back."""
        newest = self.client.search_runs(
            [self.experiment_id], order_by=[f"tags.{LAST_USED} DESC"], max_results=1
        )
        last = int(newest[0].data.tags.get(LAST_USED, 0)) if newest else 0
        return f"{max(time.time_ns(), last + 1):020}"


def finished(run: MlflowRun) -> bool:
    """Whether a stage's run counts: all of it was recorded, the manifest last."""
    return run.status == "FINISHED" and run.tags.get("complete") == "true"


def _tags(run: MlflowRun, prefix: str) -> dict[str, str]:
    """The tags that begin with a prefix, without it."""
    tags = run.tags.items()
    return {tag.removeprefix(prefix): value for tag, value in tags if tag.startswith(prefix)}
