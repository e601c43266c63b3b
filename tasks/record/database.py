"""MLflow's SQLite database: made whole or not at all, and checked before it is used.

MLflow makes one in some hundred transactions: a process that is killed between two of them leaves a
database that no MLflow opens again. So it is made under another name and then renamed.
`tasks.record.connection` and `staple up` call `ready` before anything else opens it.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import closing
from functools import cache
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from constitutions.errors import UserError

FILE = "mlflow.db"
"""Where the record is kept when the environment names no other place: in the working directory."""
FRESH = {"alembic_version": "0", "workspaces": "0", "experiments": "name != 'Default'"}
"""Tables in which a new database has rows, and the condition for rows that are a user's."""
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
OTHER_STORES = ("http", "https", "file", "databricks", "databricks-uc", "uc")
BUSY_SECONDS = 30
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
"""Errors of a place where this user cannot write."""
TABLES = "select name from sqlite_master where type = 'table' and name not like 'sqlite_%'"
REVISION = "select version_num from alembic_version"
VERSION, SCHEMA = "3.17.2", "dc11669786a5"
"""The version of MLflow that staple pins, and the schema of its database."""


def tracking_uri() -> str:
    """The record's place: MLFLOW_TRACKING_URI, or SQLite in the working directory.

    Raises:
        UserError: the variable holds no address that MLflow could use.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given and not _is_address(given):
        raise UserError(
            f"this is no address of a record: {given}",
            where="MLFLOW_TRACKING_URI",
            expected="http(s)://HOST:PORT, sqlite:///FILE, or that of another database",
        )
    return given or f"sqlite:///{Path(FILE).absolute()}"


def _is_address(uri: str) -> bool:
    """Whether MLflow knows this kind of store, and the address has a form."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    kind = uri.partition(":")[0].partition("+")[0]
    try:
        if kind in DATABASES:
            make_url(uri)
        return kind in DATABASES or (kind in OTHER_STORES and urlsplit(uri).port != 0)
    except (ArgumentError, ValueError):
        return False


def sqlite_file(uri: str) -> Path | None:
    """The database file that a tracking URI names; None: it names something else."""
    kind, _, place = uri.partition("://")
    name = place.partition("?")[0].removeprefix("/")
    if kind.partition("+")[0] != "sqlite" or name in ("", ":memory:"):
        return None
    return Path(name)


def readable(uri: str) -> Path | None:
    """The database file, if `tasks.record.runs` can read it; None: MLflow has to."""
    workspaces = os.environ.get("MLFLOW_ENABLE_WORKSPACES", "").lower() in ("1", "true")
    return None if workspaces or _newest_revision() != SCHEMA else sqlite_file(uri)


def opened(file: Path) -> sqlite3.Connection:
    """A connection to an existing database; it waits while another program locks the file."""
    uri = f"{file.absolute().as_uri()}?mode=rw"
    return sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)


def ready(uri: str) -> None:
    """Make the database that a tracking URI names, where it is missing or half made and empty.

    Stores of other kinds are left alone.

    Raises:
        UserError: the file is damaged or another MLflow's, or cannot be written.
    """
    file = sqlite_file(uri)
    if file is None or is_whole(file):
        return
    from filelock import FileLock

    lock = file.with_name(f".{file.name}.lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if not is_whole(file):
                _make(uri, file)
            lock.unlink(missing_ok=True)  # a process that waits for it finds the database
    except OSError as error:
        if error.errno in CLOSED:
            raise _closed(file, str(error.strerror)) from None
        raise


def is_whole(file: Path) -> bool:
    """Whether MLflow can use the database; False: there is none, or a half-made one without data.

    Raises:
        UserError: it is damaged, in use, or made by another version of MLflow and holds data.
    """
    if not file.exists():
        return False
    try:
        with closing(opened(file)) as database:
            tables = {str(name) for (name,) in database.execute(TABLES)}
            found = database.execute(REVISION).fetchone() if "alembic_version" in tables else None
            revision = str(found[0]) if found else "none"
            if revision == _newest_revision():
                return True
            if not any(_holds_data(database, table) for table in tables):
                return False
    except sqlite3.DatabaseError as error:
        raise unusable(file, error) from None
    raise UserError(
        f"another version of MLflow made this database (its schema is {revision})",
        where=str(file),
        expected=f"schema {_newest_revision()}",
        fix=f"copy the file, then: mlflow db upgrade sqlite:///{file.absolute()}",
    )


def _holds_data(database: sqlite3.Connection, table: str) -> bool:
    rows = f'select 1 from "{table}" where {FRESH.get(table, "1")} limit 1'
    return database.execute(rows).fetchone() is not None


def _make(uri: str, file: Path) -> None:
    """Make it beside its place, and rename it."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy.engine import make_url

    part = file.with_name(f".{file.name}.part")
    for left in (part, *_journals(part)):
        left.unlink(missing_ok=True)
    address = make_url(uri).set(database=str(part)).render_as_string(hide_password=False)
    store = SqlAlchemyStore(address, DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
    store.engine.dispose()
    for left in _journals(file):  # of a half-made one: it would be played back into the new one
        left.unlink(missing_ok=True)
    part.replace(file)


def _journals(file: Path) -> list[Path]:
    return [file.with_name(file.name + ending) for ending in ("-journal", "-wal", "-shm")]


@cache
def _newest_revision() -> str:
    """The schema of the MLflow that is installed."""
    if version("mlflow") == VERSION:
        return SCHEMA
    from mlflow.store.db.utils import _get_latest_schema_revision

    return str(_get_latest_schema_revision())


def unusable(file: Path, error: sqlite3.DatabaseError) -> UserError:
    """What is wrong with a database that SQLite cannot use."""
    if "locked" in str(error) or "busy" in str(error):
        return UserError(
            "another program has locked the record's database",
            where=str(file),
            fix="end that program, or wait for it",
        )
    if isinstance(error, sqlite3.OperationalError):
        return _closed(file, str(error))
    return _damaged(file, str(error))


def damage_behind(error: BaseException | None) -> UserError | None:
    """The message for damage that SQLite found while it worked; None: something else failed.

    MLflow wraps SQLite's errors: the whole chain is searched.
    """
    while error is not None:
        text = str(error)
        for sign in ("database disk image is malformed", "file is not a database"):
            if sign in text:
                return _damaged(sqlite_file(tracking_uri()) or Path(FILE), sign)
        error = error.__cause__ or error.__context__
    return None


def _damaged(file: Path, what: str) -> UserError:
    return UserError(
        f"the record's database is damaged: {what}",
        where=str(file),
        expected="MLflow's SQLite database",
        fix=f"put a copy of it back; or save what can be read: sqlite3 {file} .recover | "
        "sqlite3 recovered.db; or move it away to begin a new record (the files of the runs stay "
        "in mlruns)",
    )


def _closed(file: Path, what: str) -> UserError:
    return UserError(
        f"the record's database cannot be opened: {what}",
        where=str(file),
        expected="a file that this user may read and write, in such a folder",
        fix="work in another folder, or name one: MLFLOW_TRACKING_URI=sqlite:////FOLDER/mlflow.db",
    )
