"""The record: what every stage read and wrote, kept in MLflow.

One MLflow experiment per experiment, one top-level run per iteration, one nested run per stage
attempt. An attempt counts only when its run is FINISHED and its manifest was written, last; the
same fingerprint, finished, is reused instead of computed again. Stages call `Slot.attempt`; flows
and the CLI read `Record.current`. MLflow is imported when a record is opened.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from constitutions.errors import UserError
from models.engine.threads import pinned
from models.files import UNREADABLE, file_sha256, remove, seal, unseal, write_text
from models.policy import FINGERPRINT
from models.settings import Settings
from tasks.record import kept, locks
from tasks.record.code import code_versions
from tasks.record.connection import RecordConnection
from tasks.record.progress import say
from tasks.record.provenance import Acceptance, Provenance, Source
from tasks.record.tables import read_rows
from tasks.record.work import Done, Metrics, Workspace, manifest_digest

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Row = TypeVar("Row")

MANIFEST = "manifest.json"
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
BEATS_MISSED = 6
"""So many heartbeats late, by this machine's clock, another machine's attempt looks dead."""

Mode = Literal["ask", "take", "force"]
"""How a stage gets its outputs: found by fingerprint or computed; the current ones, whatever they
were made from; computed even when the record has them."""


class Looker(Protocol):
    """What stands in for computing when one only looks; `flows.states` has one."""

    def __call__(self, wanted: Provenance) -> Attempt: ...

    def attempt(self, stage: str, iteration: int) -> Attempt: ...


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
        return self.record.fetch(self, name)

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
    def _verified(self) -> dict[Path, tuple[int, int]]:
        """File → its size and time of change when its digest was last found right."""
        return {}

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
        self.log_metrics(self.iteration_run(iteration), metrics, step=max(iteration, 0))
        for path in files:
            if path.is_dir():
                self.client.log_artifacts(self.iteration_run(iteration), str(path), path.name)
            else:
                self.client.log_artifact(self.iteration_run(iteration), str(path))

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
        folder = self._local_artifacts(run_id)
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
        folder = self._local_artifacts(run_id)
        if folder is not None:
            there = (folder / name).exists()
        else:
            there = any(file.path == name for file in self.client.list_artifacts(run_id))
        if not there:
            return None
        return unseal(self._download(run_id, name))

    def fetch_folder(self, name: str) -> Path:
        """A folder of the experiment itself, in the home's cache where the store is remote."""
        return self._download(self.iteration_run(SUMMARY), name)

    def changes(self, iteration: int) -> dict[str, Any]:
        """Settings that were changed for one iteration: "cluster.max_principles" → value."""
        tags = self.client.get_run(self.iteration_run(iteration)).data.tags
        return _changes(tags)

    def all_changes(self) -> dict[int, dict[str, Any]]:
        """`changes` of every iteration that has any."""
        found = {
            int(run.data.tags["iteration"]): _changes(run.data.tags)
            for run in self.runs("tags.kind = 'iteration'")
        }
        return {iteration: changes for iteration, changes in found.items() if changes}

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
        return [self.attempt(run) for run in self.runs(_of(stage, iteration)) if finished(run)]

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
        return late < BEATS_MISSED * locks.HEARTBEAT_SECONDS

    def beats(self, run: Run) -> bool:
        """Whether another machine's attempt goes on, whatever the two clocks say: watch it."""
        if self.is_alive(run):
            return True
        for _ in range(10):
            time.sleep(locks.HEARTBEAT_SECONDS / 4)
            now = self.client.get_run(run.info.run_id)
            if now.data.tags.get(HEARTBEAT) != run.data.tags.get(HEARTBEAT):
                return bool(now.info.status == "RUNNING")
        return False

    def lock(self, fingerprint: str) -> Path:
        """The lock of what has this fingerprint; its working folder lies beside it."""
        return self.home / "work" / f"{fingerprint}.lock"

    def provenance(self, run_id: str) -> Provenance:
        """What an attempt (of any status) was to be made from."""
        path = self._download(run_id, PROVENANCE)
        tags = self.client.get_run(run_id).data.tags
        with suppress(*UNREADABLE):
            found = json.loads(path.read_bytes())
            found["inputs"] = {name: Source(*source) for name, source in found["inputs"].items()}
            provenance = Provenance(**found)
            noted = {f"input.{n}": ":".join(map(str, s)) for n, s in provenance.inputs.items()}
            if provenance.fingerprint == tags["fingerprint"] and noted.items() <= tags.items():
                return provenance
        raise self._damage(PROVENANCE, path, tags["stage"], int(tags["iteration"]), run_id)

    def fetch(self, attempt: Attempt, name: str) -> Path:
        """The local path of an attempt's output, every byte of it as the attempt wrote it."""
        path = self._download(attempt.run_id, name)
        bad = self._damaged(attempt, name, path)
        if bad and self._is_cached(path):  # perhaps only the copy is
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            path = self._download(attempt.run_id, name)
            bad = self._damaged(attempt, name, path)
        if bad:
            raise self._damage(bad, path, attempt.stage, attempt.iteration, attempt.run_id)
        return path

    def _damage(self, file: str, path: Path, stage: str, t: int, run_id: str) -> UserError:
        return UserError(
            f"the artefact {file} is not what the stage wrote: its sha256 differs",
            where=f"stage {stage} of iteration {t}, MLflow run {run_id}, {path}",
            expected="the bytes whose digest is in the run's record",
            fix=f"restore the file, or: staple stage {stage} --experiment {self.experiment} "
            f"--iteration {t} --force",
        )

    def _damaged(self, attempt: Attempt, name: str, path: Path) -> str | None:
        """The first file under `name` that differs from the manifest; None: all is well."""
        try:
            listed = json.loads(self._download(attempt.run_id, MANIFEST).read_bytes())
            if manifest_digest(listed) != attempt.digest:
                return MANIFEST
        except UNREADABLE:
            return MANIFEST
        below = {file: facts for file, facts in listed.items() if _within(file, name)}
        for file, facts in below.items():
            place = path / Path(file).relative_to(name) if file != name else path
            if not self._is_intact(place, facts["sha256"]):
                return file
        return None

    def _is_intact(self, path: Path, sha256: str) -> bool:
        if not path.is_file():
            return False
        stat = path.stat()
        state = (stat.st_size, stat.st_mtime_ns)
        if self._verified.get(path) == state:
            return True
        if file_sha256(path) != sha256:
            return False
        self._verified[path] = state
        return True

    def _download(self, run_id: str, name: str) -> Path:
        """A file or folder of a run: where it lies, or a copy under the home's cache."""
        if folder := self._local_artifacts(run_id):
            return folder / name
        kept = self.home / "cache" / run_id / name
        if not kept.exists():
            scratch = self.home / "cache" / f".{run_id}-{os.getpid()}"
            scratch.mkdir(parents=True, exist_ok=True)
            kept.parent.mkdir(parents=True, exist_ok=True)
            fetched = self.client.download_artifacts(run_id, name, str(scratch))
            if not kept.exists():
                Path(fetched).replace(kept)
            shutil.rmtree(scratch, ignore_errors=True)
        return kept

    def _local_artifacts(self, run_id: str) -> Path | None:
        """The folder of a run's files, where the store is one of this machine."""
        from mlflow.utils.file_utils import local_file_uri_to_path

        root = str(self.client.get_run(run_id).info.artifact_uri)
        return Path(local_file_uri_to_path(root)) if root.startswith(("/", "file:")) else None

    def _is_cached(self, path: Path) -> bool:
        return path.is_relative_to(self.home / "cache")

    def stamp(self) -> str:
        """Nanoseconds that sort as text, later than every stamp before, whatever the clock says."""
        newest = self.client.search_runs(
            [self.experiment_id], order_by=[f"tags.{ASKED} DESC"], max_results=1
        )
        last = int(newest[0].data.tags.get(ASKED, 0)) if newest else 0
        return f"{max(time.time_ns(), last + 1):020}"


@dataclass(frozen=True)
class Slot:
    """Where a stage runs: an experiment's record, an iteration, a seed; and how it gets on.

    `look`: nothing is computed, the looker answers.
    """

    record: Record
    iteration: int
    seed: int
    mode: Callable[[str], Mode] = lambda _stage: "ask"
    look: Looker | None = None
    device: str = "cpu"
    """What the stage computes on: an accelerator is held while it does."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What else the outputs depend on, by name: the base model's digest."""
    made: Attempts = field(default_factory=dict)
    """What the run has made or found so far: it goes on from that, whatever is current by now."""
    uses: tuple[str, ...] = ()
    """Modules that the settings chose from a registry: their code counts like the stage's own."""
    shard_size: int = 64
    """Prompts that are computed and saved together; it is in no fingerprint."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """What is worth knowing of an attempt and changes nothing: who asked for it."""

    def using(self, *modules: str, **notes: str) -> Slot:
        """The slot with what else the outputs depend on: modules, and notes by name."""
        return replace(self, uses=(*self.uses, *modules), notes={**self.notes, **notes})

    def needs(self, stage: str, iteration: int) -> Attempt:
        """What this run made, found or read first; else the current attempt, from now on.

        Raises:
            UserError: it was never finished.
        """
        key = self.record.experiment, stage, iteration
        if key not in self.made:
            self.made[key] = self.record.needs(stage, iteration)
        return self.made[key]

    def attempt(
        self,
        stage: str,
        settings: Settings,
        inputs: Mapping[str, Attempt],
        compute: Callable[[Workspace], Metrics],
    ) -> Attempt:
        """The stage's outputs: found by fingerprint, or computed and recorded.

        `compute` writes into the workspace and returns the attempt's metrics.
        """
        wanted = Provenance(
            stage=stage,
            iteration=self.iteration,
            seed=self.seed,
            code=code_versions(compute.__module__, *self.uses),
            settings=settings.model_dump(mode="json", context=FINGERPRINT),
            inputs={n: Source(a.stage, a.iteration, a.digest) for n, a in inputs.items()},
            notes=dict(self.notes),
        )
        if self.look:
            return self.look(wanted)
        lock = self.record.lock(wanted.fingerprint)
        what = f"{stage} of iteration {self.iteration} of {self.record.experiment}"
        with locks.held(lock, what):
            work = Workspace(lock.with_suffix(""), self.shard_size)
            self._wait_for_others(wanted, what)
            found = None if self.mode(stage) == "force" else self._find(wanted)
            if found is not None:
                work.remove()
                return found
            return self._compute(wanted, compute, work, what)

    def _find(self, wanted: Provenance) -> Attempt | None:
        for place, attempt in enumerate(self.record.attempts(*wanted.place)):
            if attempt.stands_for(wanted.fingerprint):
                if place > 0:
                    self.record.touch(attempt)
                return attempt
        return None

    def _wait_for_others(self, wanted: Provenance, what: str) -> None:
        """Until no other machine computes the same; what a dead process left is marked as such."""
        told = False
        while running := self._running(wanted):
            if not told:
                say(f"waiting for {running.data.tags['place']}: {what}")
            told = True
            time.sleep(2)

    def _running(self, wanted: Provenance) -> Run | None:
        """A living attempt with this fingerprint, elsewhere: here, we hold its lock."""
        here = locks.place(self.record.home)
        same = f"{_of(*wanted.place)} and tags.fingerprint = '{wanted.fingerprint}'"
        for run in self.record.runs(f"{same} and attributes.status = 'RUNNING'"):
            if run.data.tags.get("place") != here and self.record.beats(run):
                return run
            self.record.client.set_tag(run.info.run_id, "failure", "interrupted")
            self.record.client.set_terminated(run.info.run_id, "KILLED")
        return None

    def _compute(
        self,
        wanted: Provenance,
        compute: Callable[[Workspace], Metrics],
        work: Workspace,
        what: str,
    ) -> Attempt:
        client, run_id = self.record.client, self._begin(wanted)
        work.note("begun", stage=wanted.stage, iteration=wanted.iteration, run_id=run_id)
        kept.tell(stage=f"{wanted.stage} {wanted.iteration}", parts="")
        try:
            with locks.heartbeat(lambda: client.set_tag(run_id, HEARTBEAT, f"{time.time():.1f}")):
                done = work.finished() or self._work(compute, work, what)
                self._log(run_id, work.outputs, done)
        except BaseException as error:
            _give_up(client, run_id, error)
            raise
        client.set_terminated(run_id, "FINISHED")
        kept.tell(stage="")
        work.note("recorded", stage=wanted.stage, iteration=wanted.iteration, run_id=run_id)
        work.remove()
        return self.record.attempt(client.get_run(run_id), reused=False)

    def _work(self, compute: Callable[[Workspace], Metrics], work: Workspace, what: str) -> Done:
        with locks.device(self.device, what), pinned(load=False):
            started = time.monotonic()
            metrics = compute(work)
        return work.finish(metrics, time.monotonic() - started)

    def _begin(self, wanted: Provenance) -> str:
        """A RUNNING run under the iteration's, with what it is made from."""
        from mlflow.entities import Param

        sources = {f"input.{n}": ":".join(map(str, s)) for n, s in wanted.inputs.items()}
        run = self.record.client.create_run(
            self.record.experiment_id,
            run_name=f"{wanted.stage} {self.iteration}",
            tags={
                "kind": "stage",
                "stage": wanted.stage,
                "iteration": str(self.iteration),
                "fingerprint": wanted.fingerprint,
                "mlflow.parentRunId": self.record.iteration_run(self.iteration),
                "place": locks.place(self.record.home),
                HEARTBEAT: f"{time.time():.1f}",
                ASKED: self.record.stamp(),
                **sources,
                **self.tags,
            },
        )
        run_id = str(run.info.run_id)
        shown = [Param(k, json.dumps(v)[:500]) for k, v in wanted.settings.items()]
        self.record.client.log_batch(run_id, params=shown)
        self.record.client.log_dict(run_id, asdict(wanted), PROVENANCE)
        return run_id

    def _log(self, run_id: str, outputs: Path, done: Done) -> None:
        client = self.record.client
        figures = {**done.metrics, "seconds": done.seconds}
        self.record.log_metrics(run_id, figures, step=max(self.iteration, 0))
        client.log_artifacts(run_id, str(outputs))
        client.log_dict(run_id, done.manifest, MANIFEST)  # last: without it the attempt is litter
        for key, value in (
            ("digest", manifest_digest(done.manifest)),
            ("seconds", f"{done.seconds:.3f}"),
            (ASKED, self.record.stamp()),
            ("complete", "true"),
        ):
            client.set_tag(run_id, key, value)


def finished(run: Run) -> bool:
    """Whether a stage's run counts: all of it was recorded, the manifest last."""
    return run.info.status == "FINISHED" and run.data.tags.get("complete") == "true"


def _of(stage: str, iteration: int) -> str:
    return f"tags.kind = 'stage' and tags.stage = '{stage}' and tags.iteration = '{iteration}'"


def _changes(tags: Mapping[str, str]) -> dict[str, Any]:
    changed = {k: v for k, v in tags.items() if k.startswith(CHANGE)}
    return {name.removeprefix(CHANGE): json.loads(value) for name, value in changed.items()}


def _within(file: str, name: str) -> bool:
    return file == name or file.startswith(f"{name}/")


def _give_up(client: MlflowClient, run_id: str, error: BaseException) -> None:
    """Say why an attempt failed or who stopped it, unless the record itself is what failed."""
    stopped = not isinstance(error, Exception)  # Ctrl-C, or a signal that Prefect makes one of
    why = "interrupted" if stopped else f"{type(error).__name__}: {error}"[:4000]
    try:
        client.set_tag(run_id, "failure", why)
        client.set_terminated(run_id, "KILLED" if stopped else "FAILED")
    except Exception as second:
        say(f"the failure could not be recorded either: {second}")
