"""The record: what every stage read and wrote, kept in MLflow.

One MLflow experiment per experiment, one top-level run per iteration, one nested run per attempt of
a stage. An attempt counts only when its run is FINISHED and complete; the *current* one is the one
that was made or asked for last. It is *stale* when the stage would compute something else now
(`flows.states`). `tasks.record.slot` makes attempts; flows and the CLI read `Record.current`.
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
from typing import TYPE_CHECKING, Any, TypeVar

from constitutions.errors import UserError
from models.files import UNREADABLE, remove, seal, unseal, write_text
from tasks.record import locks
from tasks.record.artifacts import Artifacts
from tasks.record.connection import RecordConnection
from tasks.record.provenance import Acceptance, Provenance, Source
from tasks.record.tables import read_rows
from tasks.record.work import Metrics

if TYPE_CHECKING:
    from mlflow.entities import Run

Row = TypeVar("Row")

PROVENANCE = "derivation.json"
ASKED = "asked"
"""Tag: when an attempt began, ended, or was last asked for. The newest is the current one."""
HEARTBEAT = "heartbeat"
"""Tag of a running attempt: the wall-clock time at which its process was last alive."""
CHANGE = "set."
"""Tags of an iteration's run: settings that were changed for this iteration alone, as JSON."""
ACCEPTED = "accepted."
"""Tags of an attempt: fingerprints that it stands for as well, with who said so, as JSON."""
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

    def read(self, name: str, row_type: type[Row]) -> list[Row]:
        """The rows of `<name>.parquet`."""
        return read_rows(self.path(f"{name}.parquet"), row_type)

    def provenance(self) -> Provenance:
        """What its outputs were made from."""
        return self.record.provenance(self.run_id)


Attempts = dict[AttemptKey, Attempt]
"""What a run has made or found so far, and feeds on."""


class Record(RecordConnection):
    """An experiment's runs in MLflow, and their files."""

    @cached_property
    def artifacts(self) -> Artifacts:
        """The files of its runs."""
        return Artifacts(self.client, self.home / "cache")

    # The experiment and its iterations ------------------------------------------------------

    def iteration_run(self, iteration: int) -> str:
        """The run id of an iteration's top-level run (SUMMARY: the experiment's), made once."""
        kind = "summary" if iteration == SUMMARY else "iteration"
        found = self.runs(f"tags.kind = '{kind}' and tags.iteration = '{iteration}'")
        if found:
            return str(found[-1].info.run_id)  # the first that was made, should there be two
        name = "summary" if iteration == SUMMARY else f"iteration {iteration}"
        tags = {"kind": kind, "iteration": str(iteration), ASKED: self.stamp()}
        run = self.client.create_run(self.experiment_id, tags=tags, run_name=name)
        self.client.set_terminated(run.info.run_id)
        return str(run.info.run_id)

    def log_iteration(self, iteration: int, metrics: Metrics, files: Iterable[Path] = ()) -> None:
        """Headline metrics (at step = iteration) and files of an iteration's top-level run."""
        run_id = self.iteration_run(iteration)
        self.log_metrics(run_id, metrics, step=max(iteration, 0))
        for path in files:
            if path.is_dir():
                self.client.log_artifacts(run_id, str(path), path.name)
            else:
                self.client.log_artifact(run_id, str(path))

    def log_metrics(self, run_id: str, metrics: Metrics, step: int) -> None:
        """Metrics in one call; a value that MLflow could not draw (NaN) is our defect."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(k, float(v), now, step) for k, v in metrics.items()]
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
        return unseal(self.artifacts.path(run_id, name))

    def fetch_folder(self, name: str) -> Path:
        """A folder of the experiment itself, in the home's cache where the store is remote."""
        return self.artifacts.path(self.iteration_run(SUMMARY), name)

    def changes(self, iteration: int) -> dict[str, Any]:
        """Settings that were changed for one iteration: "cluster.max_principles" → value."""
        return self.all_changes().get(iteration, {})

    def all_changes(self) -> dict[int, dict[str, Any]]:
        """`changes` of every iteration that has any."""
        found: dict[int, dict[str, Any]] = {}
        for run in self.runs("tags.kind = 'iteration'"):
            for tag, value in run.data.tags.items():
                if tag.startswith(CHANGE):
                    changes = found.setdefault(int(run.data.tags["iteration"]), {})
                    changes[tag.removeprefix(CHANGE)] = json.loads(value)
        return found

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
        """`current`, or a UserError that says how to make it."""
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
        return [self.attempt(run) for run in self.runs(runs_of(stage, iteration)) if finished(run)]

    def attempt(self, run: Run, *, reused: bool = True) -> Attempt:
        """The finished attempt that an MLflow run stands for."""
        tags = run.data.tags
        sources = {
            key.removeprefix("input."): value.split(":")
            for key, value in tags.items()
            if key.startswith("input.")
        }
        return Attempt(
            stage=tags["stage"],
            iteration=int(tags["iteration"]),
            run_id=run.info.run_id,
            fingerprint=tags["fingerprint"],
            digest=tags["digest"],
            inputs={name: Source(s, int(t), digest) for name, (s, t, digest) in sources.items()},
            metrics=dict(run.data.metrics),
            seconds=float(tags["seconds"]),
            reused=reused,
            record=self,
            accepted={
                key.removeprefix(ACCEPTED): acceptance
                for key, value in tags.items()
                if key.startswith(ACCEPTED) and (acceptance := Acceptance.read(value))
            },
        )

    def touch(self, attempt: Attempt) -> None:
        """Make an older attempt the current one again (its fingerprint was asked for)."""
        self.client.set_tag(attempt.run_id, ASKED, self.stamp())

    def accept(self, attempt: Attempt, fingerprint: str, by: str, modules: Iterable[str]) -> None:
        """Let an attempt stand for another fingerprint, from which only its code differs."""
        when = datetime.now(UTC).isoformat(timespec="seconds")
        word = Acceptance(by, when, list(modules))
        self.client.set_tag(attempt.run_id, ACCEPTED + fingerprint, json.dumps(word._asdict()))

    def runs(self, where: str) -> list[Run]:
        """The experiment's MLflow runs that match a filter, the newest by ASKED first."""
        found: list[Run] = []
        token: str | None = None
        while token is None or token:
            page = self.client.search_runs(
                [self.experiment_id], where, order_by=[f"tags.{ASKED} DESC"], page_token=token
            )
            found += page
            token = page.token or ""
        return found

    def is_alive(self, run: Run) -> bool:
        """Whether the process behind a RUNNING attempt still works on it.

        Of this place its lock tells; of another machine its heartbeat, by this machine's clock.
        """
        tags = run.data.tags
        if run.info.status != "RUNNING":
            return False
        if tags.get("place") == locks.place(self.home):
            return locks.is_held(self.lock(tags["fingerprint"]))
        late = abs(time.time() - float(tags.get(HEARTBEAT, 0)))
        return late < locks.BEATS_MISSED * locks.HEARTBEAT_SECONDS

    def lock(self, fingerprint: str) -> Path:
        """The lock of what has this fingerprint; its working folder lies beside it."""
        return self.home / "work" / f"{fingerprint}.lock"

    def provenance(self, run_id: str) -> Provenance:
        """What an attempt (of any status) was to be made from."""
        path = self.artifacts.path(run_id, PROVENANCE)
        tags = self.client.get_run(run_id).data.tags
        with suppress(*UNREADABLE):
            found = json.loads(path.read_bytes())
            found["inputs"] = {name: Source(*source) for name, source in found["inputs"].items()}
            provenance = Provenance(**found)
            noted = {f"input.{n}": ":".join(map(str, s)) for n, s in provenance.inputs.items()}
            if provenance.fingerprint == tags["fingerprint"] and noted.items() <= tags.items():
                return provenance
        raise self.artifacts.damage(run_id, PROVENANCE, path)

    def stamp(self) -> str:
        """Nanoseconds that sort as text, later than every stamp before, whatever the clock says."""
        newest = self.client.search_runs(
            [self.experiment_id], order_by=[f"tags.{ASKED} DESC"], max_results=1
        )
        last = int(newest[0].data.tags.get(ASKED, 0)) if newest else 0
        return f"{max(time.time_ns(), last + 1):020}"


def finished(run: Run) -> bool:
    """Whether a stage's run counts: all of it was recorded, the manifest last."""
    return run.info.status == "FINISHED" and run.data.tags.get("complete") == "true"


def runs_of(stage: str, iteration: int) -> str:
    """MLflow's filter for the attempts of a stage."""
    return f"tags.kind = 'stage' and tags.stage = '{stage}' and tags.iteration = '{iteration}'"
