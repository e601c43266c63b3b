"""An experiment's place in MLflow: the client, and the MLflow experiment of its name."""

from __future__ import annotations

import socket
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from constitutions.errors import UserError
from models.endpoint.proxies import proxy_of
from tasks.record import database
from tasks.record.runs import ClientReader, FileReader, Reader

if TYPE_CHECKING:
    from mlflow import MlflowClient


TRAINING = {"mlflow.experimentKind": "custom_model_development"}
"""Tag of the experiment: MLflow's page opens on runs, not on traces."""


class RecordConnection:
    """One experiment in MLflow: what is missing is created, from several processes at once.

    What only reads needs no client.

    Args:
        experiment: the experiment's name.
        home: where partial work and fetched artefacts are kept.
        tracking_uri: None takes MLFLOW_TRACKING_URI, or SQLite in the working directory.
    """

    def __init__(self, experiment: str, home: Path, tracking_uri: str | None = None) -> None:
        self.experiment = experiment
        self.home = home
        self.tracking_uri = tracking_uri or database.tracking_uri()

    @cached_property
    def client(self) -> MlflowClient:
        """The MLflow client. It creates what is missing, under a lock: two at once break it.

        Raises:
            UserError: the experiment was deleted, or the record cannot be used.
        """
        from filelock import FileLock

        self.home.mkdir(parents=True, exist_ok=True)
        with FileLock(self.home / "mlflow.lock"):
            database.ready(self.tracking_uri)
            client = self._connect()
            if self._find() is None:
                _create(client, self.experiment)
        return client

    @cached_property
    def reader(self) -> Reader:
        """Reads runs: from the SQLite file, or through MLflow."""
        file = database.readable(self.tracking_uri)
        return FileReader(file) if file else ClientReader(self._connect())

    @cached_property
    def experiment_id(self) -> str:
        """MLflow's identifier of the experiment, which is created where it is missing.

        Raises:
            UserError: as `client`.
        """
        found = self._find() or (self.client and self._find())
        assert found, "the client creates it"
        return found

    def exists(self) -> bool:
        """Whether anything was ever recorded under this name (creates nothing).

        Raises:
            UserError: the experiment was deleted, or the record cannot be used.
        """
        return self._find() is not None

    def neighbours(self) -> list[str]:
        """The names of all experiments in this MLflow, staple's or not, the newest last.

        Raises:
            UserError: the record cannot be used.
        """
        file = database.sqlite_file(self.tracking_uri)
        return [] if file is not None and not database.is_whole(file) else self.reader.names()

    def _find(self) -> str | None:
        """MLflow's identifier of the experiment; None where there is none of this name."""
        file = database.sqlite_file(self.tracking_uri)
        if file is not None and not database.is_whole(file):
            return None
        found = self.reader.experiment(self.experiment)
        if found is None or not found.deleted:
            return found and found.experiment_id
        place = "" if "@" in self.tracking_uri else f"MLFLOW_TRACKING_URI={self.tracking_uri} "
        raise UserError(
            "this experiment was deleted in MLflow",
            where=f"experiment {self.experiment}",
            fix=f"take another name (--set experiment=NAME), or restore it: {place}"
            f"mlflow experiments restore --experiment-id {found.experiment_id}",
        )

    def _connect(self) -> MlflowClient:
        """A client whose server answers: MLflow itself would retry silently for two minutes."""
        from mlflow import MlflowClient

        address = urlsplit(self.tracking_uri)
        if address.scheme in ("http", "https") and address.hostname:
            proxy = proxy_of(self.tracking_uri)
            asked = urlsplit(proxy.address) if proxy else address
            try:
                port = asked.port or (443 if asked.scheme == "https" else 80)
                socket.create_connection((asked.hostname or "", port), timeout=10).close()
            except (OSError, ValueError) as error:
                through = f" (asked through the proxy in {proxy.source})" if proxy else ""
                raise UserError(
                    f"MLflow does not answer{through}: {error}",
                    where=f"MLFLOW_TRACKING_URI, {address.netloc.rpartition('@')[2]}",
                    expected="a running MLflow server",
                    fix="start it (staple up starts one here), or unset MLFLOW_TRACKING_URI to "
                    "keep the record in a file",
                ) from None
        return MlflowClient(tracking_uri=self.tracking_uri)


def _create(client: MlflowClient, experiment: str) -> None:
    """Another machine may create it in the same moment."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_experiment(experiment, tags=TRAINING)
    except MlflowException:
        if client.get_experiment_by_name(experiment) is None:
            raise
