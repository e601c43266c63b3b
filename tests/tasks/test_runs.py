"""The record's SQLite file, read here as MLflow reads it."""

from __future__ import annotations

import math
import shutil
import sqlite3
import tomllib
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.store.db.utils import _get_latest_schema_revision

from constitutions.errors import UserError
from tasks.record import database
from tasks.record.record import Record
from tasks.record.runs import ClientReader, FileReader

ROOT = Path(__file__).parents[2]


@pytest.fixture
def file(tmp_path: Path, migrated_database: Path) -> Path:
    """A database with an experiment of many runs: tagged, measured, failed, deleted."""
    file = tmp_path / "a % b.db"
    shutil.copy(migrated_database, file)
    client = MlflowClient(f"sqlite:///{file}")
    for name in ("mine", "other"):
        number = client.create_experiment(name)
        for i in range(4):
            tags = {"kind": "stage", "stage": "it's" if i else "train", "iteration": str(i)}
            run = client.create_run(number, tags=tags, start_time=1000 + i // 2)
            for value in (1.5, i / 3):
                client.log_metric(run.info.run_id, "rate", value)
            client.set_terminated(run.info.run_id, "FAILED" if i == 1 else "FINISHED")
        client.log_metric(run.info.run_id, "none", math.nan)
        client.delete_run(run.info.run_id)
        client.create_run(number)  # of another program, and RUNNING
    client.delete_experiment(client.create_experiment("gone"))
    return file


def test_the_pinned_mlflow_has_this_schema() -> None:
    """A new pin of MLflow: look whether the tables that `FileReader` reads are still the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert f"mlflow[auth]=={database.VERSION}" in project["dependencies"]
    assert version("mlflow") == database.VERSION
    assert _get_latest_schema_revision() == database.SCHEMA


def test_the_file_says_what_mlflow_says(file: Path) -> None:
    theirs, ours = ClientReader(MlflowClient(f"sqlite:///{file}")), FileReader(file)
    for name in ("mine", "other", "gone", "absent", "it's"):
        assert ours.experiment(name) == theirs.experiment(name)
    found = ours.experiment("mine")
    assert found and not found.deleted
    for tags in ({}, {"kind": "stage"}, {"kind": "stage", "iteration": "1"}):
        assert ours.runs(found.experiment_id, tags) == theirs.runs(found.experiment_id, tags)
    assert len(ours.runs(found.experiment_id, {})) == 4, "one of five is deleted"
    assert len(ours.runs(found.experiment_id, {"stage": "it's"})) == 2
    failed = ours.runs(found.experiment_id, {"iteration": "1"})[0]
    assert (failed.status, failed.metrics) == ("FAILED", {"rate": 1 / 3})
    for run in ours.runs(found.experiment_id, {}):
        assert ours.run(run.run_id) == theirs.run(run.run_id) == run


def test_a_deleted_run_and_a_value_that_is_no_number(file: Path) -> None:
    with closing(sqlite3.connect(file)) as tables:
        deleted = "select run_uuid from runs where lifecycle_stage = 'deleted' limit 1"
        run_id = tables.execute(deleted).fetchone()[0]
    run = FileReader(file).run(run_id)
    assert run.metrics["rate"] == 1.0 and math.isnan(run.metrics["none"])


def test_no_such_run(file: Path) -> None:
    with pytest.raises(UserError, match="run 0123: the record has no such run"):
        FileReader(file).run("0123")


def test_a_file_that_is_gone_is_not_made_again(file: Path) -> None:
    file.unlink()
    with pytest.raises(UserError, match="cannot be opened"):
        FileReader(file).experiment("mine")
    assert not file.exists()


@pytest.mark.parametrize("name", ["MLFLOW_ENABLE_WORKSPACES", "another version of MLflow"])
def test_mlflow_reads_what_is_not_known_here(
    file: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    uri, home = f"sqlite:///{file}", file.parent / "home"
    assert isinstance(Record("mine", home, uri).reader, FileReader)
    if name == "MLFLOW_ENABLE_WORKSPACES":
        monkeypatch.setenv(name, "true")
        assert database.readable(uri) is None
        return
    monkeypatch.setattr(database, "SCHEMA", "of an older one")
    monkeypatch.setattr(database, "VERSION", "3.0")
    database._newest_revision.cache_clear()
    try:
        record = Record("mine", home, uri)
        assert isinstance(record.reader, ClientReader)
        found = {(run.tags["iteration"], run.status) for run in record.runs(kind="stage")}
        assert found == {("0", "FINISHED"), ("1", "FAILED"), ("2", "FINISHED")}
    finally:
        database._newest_revision.cache_clear()
