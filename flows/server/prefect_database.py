"""Prefect's database: which one a server uses, created in one process at a time.

Prefect's own default is one database for each login, where the dashboards of two checkouts show
each other's runs, and each overwrites the deployments of the other. A kill does no harm: each of
Prefect's migrations is one transaction, and the next start continues.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from models.files import user_cache

URL = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
CHOICES = {"connection_url", "driver"}
"""Prefect's settings of a database; with one of them the user has chosen."""


def own(home: Path) -> dict[str, str]:
    """The environment variable that puts a server's database into this folder.

    Empty where the user has chosen another one, also by PREFECT_HOME.
    """
    from prefect.settings import get_current_settings

    chosen = get_current_settings().server.database.model_fields_set & CHOICES
    if chosen or "PREFECT_HOME" in os.environ:
        return {}
    return {URL: f"sqlite+aiosqlite:///{home.absolute() / 'prefect.db'}"}


def file() -> Path:
    """The database's file; for a server of databases, where the file would be."""
    from prefect.settings import get_current_settings
    from sqlalchemy import make_url

    settings = get_current_settings()
    url = settings.server.database.connection_url
    assert url is not None, "Prefect fills in its default"
    parts = make_url(url.get_secret_value())
    local = parts.get_backend_name() == "sqlite" and parts.database
    return Path(local) if local else settings.home / "prefect.db"


def make() -> None:
    """Create the database, or migrate it to the installed Prefect, before a server starts.

    Only a user's first call of each version of Prefect takes a while, or waits for another process:
    a new database is a copy of an empty one that the first call keeps.
    """
    import prefect
    from filelock import FileLock

    database = file()
    made = database.parent / f".database-{prefect.__version__}"
    empty = user_cache() / f"prefect-{prefect.__version__}.db"
    if database.exists() and made.exists():
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(database.parent / ".database.lock"):
        if database.exists() and made.exists():
            return
        new = not database.exists()
        if new and empty.is_file():
            _copy(empty, database)
        asyncio.run(_migrate())
        if database.is_file() and new and not empty.is_file():
            _keep(database, empty)
        made.touch()


def _keep(database: Path, empty: Path) -> None:
    """Keep a copy of an empty database; without a place for it, the next one takes as long."""
    try:
        empty.parent.mkdir(parents=True, exist_ok=True)
        _copy(database, empty)
    except (OSError, sqlite3.Error):
        empty.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    with closing(sqlite3.connect(source)) as found, closing(sqlite3.connect(unfinished)) as made:
        found.backup(made)
    unfinished.replace(target)


async def _migrate() -> None:
    from prefect.server.database.dependencies import provide_database_interface

    interface = provide_database_interface()
    await interface.create_db()
    await (await interface.engine()).dispose()
