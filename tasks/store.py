"""The record: what every stage read and wrote, kept in MLflow.

One MLflow experiment per experiment, one top-level run per iteration, one nested run per stage
attempt. An attempt counts only when its run is FINISHED and its manifest was written, last; the
same fingerprint, finished, is reused instead of computed again. Stages call `Slot.attempt`; flows
and the CLI read `Record.current`. MLflow is imported when a record is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pyarrow.parquet as pq

from constitutions.errors import UserError
from models.settings import Settings
from tasks.code import code_version
from tasks.records import from_table, to_table

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Row = TypeVar("Row")
Metrics = dict[str, float]

MANIFEST = "manifest.json"
ASKED = "asked"
"""Tag: when an attempt was finished, or last asked for. The newest is the current one."""
FIGURES = (".png", ".html")
"""For people: no stage reads them, so they have no part in the digest."""
SUMMARY = -1
"""The iteration number under which the experiment's own summary run is kept."""


class Source(NamedTuple):
    """An attempt that another one read: where it stood, and the digest that it had then."""

    stage: str
    iteration: int
    digest: str


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
    tracking_uri: str

    def path(self, name: str) -> Path:
        """Local path of an output file or folder (downloaded when the store is remote)."""
        import mlflow

        local = mlflow.artifacts.download_artifacts(
            run_id=self.run_id, artifact_path=name, tracking_uri=self.tracking_uri
        )
        return Path(local)

    def read(self, name: str, row_type: type[Row]) -> list[Row]:
        """The rows of `<name>.parquet`."""
        return from_table(pq.read_table(self.path(f"{name}.parquet")), row_type)


class Workspace:
    """Where an attempt writes before it counts: a folder named by the fingerprint.

    Shards that were finished by a killed attempt with the same fingerprint are found again.
    """

    def __init__(self, folder: Path) -> None:
        self.outputs = folder / "outputs"
        self.parts = folder / "parts"
        for path in (self.outputs, self.parts):
            path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, rows: Iterable[Any], row_type: type) -> None:
        """Write `<name>.parquet` whole or not at all."""
        _write_parquet(self.outputs / f"{name}.parquet", rows, row_type)

    def sharded(
        self,
        name: str,
        row_type: type[Row],
        shards: Sequence[Sequence[Any]],
        compute: Callable[[Sequence[Any]], Sequence[Row]],
        found: Callable[[Sequence[Any]], None],
    ) -> list[Row]:
        """`compute` over shards, each kept when finished; then `<name>.parquet` from all of them.

        `found` is told of each shard that an earlier, killed attempt had finished.
        """
        rows: list[Row] = []
        for number, shard in enumerate(shards):
            part = self.parts / f"{name}-{number:05}.parquet"
            if part.exists():
                found(shard)
            else:
                _write_parquet(part, compute(shard), row_type)
            rows += from_table(pq.read_table(part), row_type)
        self.write(name, rows, row_type)
        return rows

    def manifest(self) -> dict[str, dict[str, Any]]:
        """File → sha256 and, for Parquet, rows; by sorted relative path."""
        files = sorted(p for p in self.outputs.rglob("*") if p.is_file())
        return {str(p.relative_to(self.outputs)): _describe(p) for p in files}


class Record:
    """One experiment in MLflow. Opening it creates what is missing; several processes may.

    Args:
        experiment: the experiment's name.
        home: where partial work is kept.
        tracking_uri: None takes MLFLOW_TRACKING_URI, or SQLite in the working directory.
    """

    def __init__(self, experiment: str, home: Path, tracking_uri: str | None = None) -> None:
        self.experiment = experiment
        self.home = home
        self.tracking_uri = tracking_uri or os.environ.get(
            "MLFLOW_TRACKING_URI", f"sqlite:///{Path('mlflow.db').absolute()}"
        )

    @cached_property
    def client(self) -> MlflowClient:
        """The MLflow client; the database is created under a lock (two creators break it)."""
        from filelock import FileLock
        from mlflow import MlflowClient

        self.home.mkdir(parents=True, exist_ok=True)
        with FileLock(self.home / "mlflow.lock"):
            client = MlflowClient(tracking_uri=self.tracking_uri)
            if client.get_experiment_by_name(self.experiment) is None:
                client.create_experiment(self.experiment)
        return client

    @cached_property
    def experiment_id(self) -> str:
        """MLflow's identifier of the experiment."""
        found = self.client.get_experiment_by_name(self.experiment)
        assert found is not None, "the client creates it"
        return str(found.experiment_id)

    def exists(self) -> bool:
        """Whether anything was ever recorded under this name (creates nothing)."""
        file = self.tracking_uri.removeprefix("sqlite:///")
        if file != self.tracking_uri and not Path(file).exists():
            return False
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.tracking_uri)
        return client.get_experiment_by_name(self.experiment) is not None

    def iteration_run(self, iteration: int) -> str:
        """The run id of an iteration's top-level run (SUMMARY: the experiment's), made once."""
        kind = "summary" if iteration == SUMMARY else "iteration"
        found = self._runs(f"tags.kind = '{kind}' and tags.iteration = '{iteration}'")
        if found:
            return str(found[0].info.run_id)
        name = "summary" if iteration == SUMMARY else f"iteration {iteration}"
        tags = {"kind": kind, "iteration": str(iteration)}
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
        runs = self._runs(
            f"tags.kind = 'stage' and tags.stage = '{stage}' and tags.iteration = '{iteration}' "
            "and tags.complete = 'true' and attributes.status = 'FINISHED'"
        )
        return [self._attempt(run, reused=True) for run in runs]

    def states(self, stage: str, iteration: int) -> list[str]:
        """MLflow's status of every attempt, the newest first: RUNNING, FAILED, FINISHED, …"""
        where = f"tags.kind='stage' and tags.stage='{stage}' and tags.iteration='{iteration}'"
        return [str(run.info.status) for run in self._runs(where)]

    def touch(self, attempt: Attempt) -> None:
        """Make an older attempt the current one again (its fingerprint was asked for)."""
        self.client.set_tag(attempt.run_id, ASKED, _now())

    def _runs(self, where: str) -> list[Run]:
        order = [f"tags.{ASKED} DESC", "attributes.start_time DESC"]
        return list(self.client.search_runs([self.experiment_id], where, order_by=order))

    def _attempt(self, run: Run, *, reused: bool) -> Attempt:
        tags = run.data.tags
        return Attempt(
            stage=tags["stage"],
            iteration=int(tags["iteration"]),
            run_id=run.info.run_id,
            fingerprint=tags["fingerprint"],
            digest=tags["digest"],
            inputs={
                key.removeprefix("input."): Source(stage, int(iteration), digest)
                for key, value in tags.items()
                if key.startswith("input.")
                for stage, iteration, digest in [value.split(":")]
            },
            metrics=dict(run.data.metrics),
            seconds=float(tags["seconds"]),
            reused=reused,
            tracking_uri=self.tracking_uri,
        )


@dataclass(frozen=True)
class Slot:
    """Where a stage runs: an experiment's record, an iteration, a seed.

    `force` computes again even what the record already has.
    """

    record: Record
    iteration: int
    seed: int
    force: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)
    """What else the outputs depend on, by name: the base model's digest."""

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
        from filelock import FileLock

        described = self._describe(stage, settings, inputs, compute)
        fingerprint = text_sha256(json.dumps(described, sort_keys=True))
        folder = self.record.home / "work" / fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            found = None if self.force else self._find(stage, fingerprint)
            if found is not None:
                shutil.rmtree(folder, ignore_errors=True)
                return found
            return self._compute(stage, described, fingerprint, inputs, compute, folder)

    def _describe(
        self,
        stage: str,
        settings: Settings,
        inputs: Mapping[str, Attempt],
        compute: Callable[[Workspace], Metrics],
    ) -> dict[str, Any]:
        return {
            "stage": stage,
            "iteration": self.iteration,
            "seed": self.seed,
            "code": code_version(compute.__module__),
            "settings": settings.model_dump(mode="json"),
            "inputs": {name: attempt.digest for name, attempt in inputs.items()},
            "notes": dict(self.notes),
        }

    def _find(self, stage: str, fingerprint: str) -> Attempt | None:
        attempts = self.record.attempts(stage, self.iteration)
        for place, attempt in enumerate(attempts):
            if attempt.fingerprint == fingerprint:
                if place > 0:
                    self.record.touch(attempt)
                return attempt
        return None

    def _compute(
        self,
        stage: str,
        described: dict[str, Any],
        fingerprint: str,
        inputs: Mapping[str, Attempt],
        compute: Callable[[Workspace], Metrics],
        folder: Path,
    ) -> Attempt:
        client = self.record.client
        run = client.create_run(
            self.record.experiment_id,
            run_name=f"{stage} {self.iteration}",
            tags={
                "kind": "stage",
                "stage": stage,
                "iteration": str(self.iteration),
                "fingerprint": fingerprint,
                "mlflow.parentRunId": self.record.iteration_run(self.iteration),
                **{f"input.{n}": f"{a.stage}:{a.iteration}:{a.digest}" for n, a in inputs.items()},
            },
        )
        run_id = run.info.run_id
        try:
            self._fill(stage, run_id, described, compute, Workspace(folder))
        except BaseException as error:
            client.set_tag(run_id, "failure", str(error)[:4000])
            client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id, "FINISHED")
        shutil.rmtree(folder, ignore_errors=True)
        return self.record._attempt(client.get_run(run_id), reused=False)

    def _fill(
        self,
        stage: str,
        run_id: str,
        described: dict[str, Any],
        compute: Callable[[Workspace], Metrics],
        work: Workspace,
    ) -> None:
        client, started = self.record.client, time.monotonic()
        client.log_dict(run_id, described, "described.json")
        metrics = compute(work)
        manifest = work.manifest()
        seconds = time.monotonic() - started
        self.record.log_metrics(
            run_id, {**metrics, "seconds": seconds}, step=max(self.iteration, 0)
        )
        client.log_artifacts(run_id, str(work.outputs))
        client.log_dict(run_id, manifest, MANIFEST)  # last: without it the attempt is litter
        data = {name: d for name, d in manifest.items() if not name.endswith(FIGURES)}
        digest = text_sha256(json.dumps(data, sort_keys=True))
        for key, value in (
            ("digest", digest),
            ("seconds", f"{seconds:.3f}"),
            (ASKED, _now()),
            ("complete", "true"),
        ):
            client.set_tag(run_id, key, value)


def shards(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    """Rows in consecutive groups of at most `size`."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _now() -> str:
    """Nanoseconds that sort as text."""
    return f"{time.time_ns():020}"


def _write_parquet(path: Path, rows: Iterable[Any], row_type: type) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as sink:
        pq.write_table(to_table(rows, row_type), sink)
        sink.flush()
        os.fsync(sink.fileno())
    temporary.replace(path)


def _describe(path: Path) -> dict[str, Any]:
    described: dict[str, Any] = {"sha256": file_sha256(path)}
    if path.suffix == ".parquet":
        described["rows"] = pq.read_metadata(path).num_rows
    return described


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def text_sha256(text: str) -> str:
    """sha256 (hex) of a text's UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
