"""What the record reads of MLflow: its experiments and its runs.

MLflow takes two processor seconds to import and one to open a database, and a command that finds
everything in the record only reads. So a SQLite file is read here; MLflow writes it, and reads
records of other kinds.
"""

from __future__ import annotations

import math
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from constitutions.errors import UserError
from tasks.record import database

if TYPE_CHECKING:
    from mlflow import MlflowClient, entities

TAGGED = (
    " and exists (select 1 from tags t where t.run_uuid = r.run_uuid and key = ? and value = ?)"
)


@dataclass(frozen=True)
class MlflowRun:
    """What the record uses of an MLflow run."""

    run_id: str
    status: str
    """RUNNING, FINISHED, FAILED, KILLED or SCHEDULED."""
    artifact_uri: str
    start_time: int
    """In milliseconds since 1970."""
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    """The newest value of each."""


class MlflowExperiment(NamedTuple):
    """An MLflow experiment: its identifier, and whether a user deleted it."""

    experiment_id: str
    deleted: bool


class Reader(Protocol):
    """Reads experiments and runs."""

    def names(self) -> list[str]:
        """The names of all experiments that are not deleted, the newest last."""

    def experiment(self, name: str) -> MlflowExperiment | None:
        """The experiment of this name, also a deleted one; None where there is none."""

    def runs(self, experiment_id: str, tags: Mapping[str, str]) -> list[MlflowRun]:
        """The runs that have these tags and are not deleted, those that began last first."""

    def run(self, run_id: str) -> MlflowRun:
        """One run, also a deleted one."""


class ClientReader:
    """Reads through MLflow, whatever keeps the record."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def names(self) -> list[str]:
        """As `Reader.names`."""
        found: list[str] = []
        token: str | None = None
        while token is None or token:
            page = self._client.search_experiments(order_by=["creation_time ASC"], page_token=token)
            found += [one.name for one in page]
            token = page.token or ""
        return found

    def experiment(self, name: str) -> MlflowExperiment | None:
        """As `Reader.experiment`."""
        found = self._client.get_experiment_by_name(name)
        if found is None:
            return None
        return MlflowExperiment(str(found.experiment_id), found.lifecycle_stage == "deleted")

    def runs(self, experiment_id: str, tags: Mapping[str, str]) -> list[MlflowRun]:
        """As `Reader.runs`."""
        where = " and ".join(f"tags.{name} = '{value}'" for name, value in tags.items())
        found: list[MlflowRun] = []
        token: str | None = None
        while token is None or token:
            page = self._client.search_runs([experiment_id], where, page_token=token)
            found += map(_run, page)
            token = page.token or ""
        return found

    def run(self, run_id: str) -> MlflowRun:
        """As `Reader.run`.

        Raises:
            MlflowException: there is none.
        """
        return _run(self._client.get_run(run_id))


def _run(run: entities.Run) -> MlflowRun:
    info, data = run.info, run.data
    uri, began = str(info.artifact_uri), int(info.start_time)
    return MlflowRun(info.run_id, info.status, uri, began, dict(data.tags), dict(data.metrics))


class FileReader:
    """Reads the SQLite database of an MLflow whose schema is `database.SCHEMA`.

    Every method opens the file anew, and raises a UserError if that or SQLite fails.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def names(self) -> list[str]:
        """As `Reader.names`."""
        with self._opened() as tables:
            query = (
                "select name from experiments where lifecycle_stage = 'active' "
                "order by creation_time, experiment_id"
            )
            return [str(name) for (name,) in tables.execute(query)]

    def experiment(self, name: str) -> MlflowExperiment | None:
        """As `Reader.experiment`."""
        with self._opened() as tables:
            query = "select experiment_id, lifecycle_stage from experiments where name = ?"
            found = tables.execute(query, (name,)).fetchone()
        return MlflowExperiment(str(found[0]), found[1] == "deleted") if found else None

    def runs(self, experiment_id: str, tags: Mapping[str, str]) -> list[MlflowRun]:
        """As `Reader.runs`."""
        where = "experiment_id = ? and lifecycle_stage = 'active'" + TAGGED * len(tags)
        values = [value for tag in tags.items() for value in tag]
        return self._read(where, [int(experiment_id), *values])

    def run(self, run_id: str) -> MlflowRun:
        """As `Reader.run`.

        Raises:
            UserError: there is none.
        """
        found = self._read("run_uuid = ?", [run_id])
        if not found:
            raise UserError("the record has no such run", where=f"{self._file}, run {run_id}")
        return found[0]

    def _read(self, where: str, values: list[str | int]) -> list[MlflowRun]:
        chosen = f"select run_uuid from runs r where {where}"
        tags: defaultdict[str, dict[str, str]] = defaultdict(dict)
        metrics: defaultdict[str, dict[str, float]] = defaultdict(dict)
        with self._opened() as tables:
            for run, name, value in tables.execute(
                f"select run_uuid, key, value from tags where run_uuid in ({chosen})", values
            ):
                tags[run][name] = value
            for run, name, value, is_nan in tables.execute(
                "select run_uuid, key, value, is_nan from latest_metrics "
                f"where run_uuid in ({chosen})",
                values,
            ):
                metrics[run][name] = math.nan if is_nan else value
            found = tables.execute(
                f"select run_uuid, status, artifact_uri, start_time from runs r where {where} "
                "order by start_time desc, run_uuid",
                values,
            ).fetchall()
        return [
            MlflowRun(run, status, uri, began, tags[run], metrics[run])
            for run, status, uri, began in found
        ]

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """The database in a transaction: all that the block reads is of one moment."""
        try:
            with closing(database.opened(self._file)) as tables:
                tables.execute("begin")
                yield tables
        except sqlite3.DatabaseError as error:
            raise database.unusable(self._file, error) from None
