"""MLflow's SQLite database: whole or not there, whenever the process that makes it is killed."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from command import staple
from sqlalchemy import create_engine

from constitutions.errors import UserError
from tasks.record.database import is_whole, ready, sqlite_file
from tasks.record.record import Record

ROOT = Path(__file__).parents[2]


def change(file: Path, *statements: str) -> None:
    with closing(sqlite3.connect(file)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()


def uri(file: Path) -> str:
    return f"sqlite:///{file}"


def test_killed_while_it_makes_the_database(tmp_path: Path) -> None:
    """The real process, killed among the migrations; then what an older release left then."""
    file, part = tmp_path / "mlflow.db", tmp_path / ".mlflow.db.part"
    command = f"from tasks.record.database import ready; ready({uri(file)!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", command], cwd=tmp_path, env=environment)
    while process.poll() is None and not (part.exists() and part.stat().st_size > 200_000):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert part.exists() and not file.exists(), "it was killed halfway, and nothing shows it"

    shutil.copy(part, file)  # made in place, it would lie here now
    journal = part.with_name(part.name + "-journal")
    if journal.exists():
        shutil.copy(journal, tmp_path / "mlflow.db-journal")
    assert not is_whole(file)
    ready(uri(file))
    assert is_whole(file)
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    record = Record("an-experiment", tmp_path / "home", uri(file))
    assert not record.exists()
    assert record.runs() == [] and record.exists()


def initial_tables(file: Path) -> None:
    from mlflow.store.tracking.dbmodels.initial_models import Base

    engine = create_engine(uri(file))
    Base.metadata.create_all(engine)
    engine.dispose()


HALF_MADE: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "no tables": lambda file: change(file, "create table t (x)", "drop table t"),
    "the first tables": initial_tables,
}


@pytest.mark.parametrize("make", HALF_MADE.values(), ids=HALF_MADE)
def test_half_made_without_data_is_no_database(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "mlflow.db")
    assert not is_whole(tmp_path / "mlflow.db")


def test_half_migrated_without_data_is_no_database(workplace: Path) -> None:
    file = workplace / "mlflow.db"
    assert is_whole(file)
    change(file, "update alembic_version set version_num = '451aebb31d03'")
    assert not is_whole(file)
    change(file, "delete from alembic_version")
    assert not is_whole(file)


def test_another_versions_database_with_data_is_left_alone(workplace: Path) -> None:
    file = workplace / "mlflow.db"
    Record("an-experiment", workplace / "home").iteration_run(1)
    change(file, "update alembic_version set version_num = '451aebb31d03'")
    before = file.read_bytes()
    with pytest.raises(UserError, match=f"schema is 451aebb31d03.*mlflow db upgrade {uri(file)}"):
        ready(uri(file))
    assert file.read_bytes() == before


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 3)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "is damaged"),
    "cut in its first page": (lambda file: os.truncate(file, 50), "is damaged"),
    "another file": (lambda file: file.write_text("a note\n" * 500), "is damaged"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "cannot be opened"),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize(("damage", "what"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_database_is_one_message(
    workplace: Path,
    damage: Callable[[Path], object],
    what: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = workplace / "mlflow.db"
    damage(file)
    for words in (["status", "e"], ["run", "planted", "--set", "experiment=e"], ["report", "e"]):
        ran = staple(capsys, *words)
        assert ran.code == 2, words
        assert str(file) in ran.err and what in ran.err, words
        assert "Traceback" not in ran.err


def test_damage_that_shows_later_names_the_file(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Record("e", workplace / ".staple").iteration_run(1)
    file = workplace / "mlflow.db"
    content = bytearray(file.read_bytes())
    with closing(sqlite3.connect(file)) as database:
        (root,) = database.execute(
            "select rootpage from sqlite_master where name = 'runs'"
        ).fetchone()
        (size,) = database.execute("pragma page_size").fetchone()
    content[(root - 1) * size : root * size] = bytes(size)
    file.write_bytes(content)
    ran = staple(capsys, "status", "e")
    assert ran.code != 0
    assert str(file) in ran.err and "is damaged" in ran.err and "Traceback" not in ran.err


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be opened.*MLFLOW_TRACKING_URI"):
        ready(uri(tmp_path / "file" / "mlflow.db"))


def test_what_is_no_file_is_left_alone() -> None:
    for other in ("http://127.0.0.1:1", "postgresql://u@h/db", "sqlite://", "sqlite:///:memory:"):
        assert sqlite_file(other) is None
    ready("http://127.0.0.1:1")
