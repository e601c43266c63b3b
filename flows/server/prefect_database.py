"""Creates Prefect's database in one process at a time: two servers at once would break it.

A kill does no harm: each of Prefect's migrations is one transaction, and the next start continues.
"""

from __future__ import annotations

import asyncio


def make() -> None:
    """Create the database, or migrate it to the installed Prefect, before a server starts.

    Only the first call of each version of Prefect takes a while, or waits for another process.
    """
    import prefect
    from filelock import FileLock
    from prefect.settings import get_current_settings

    home = get_current_settings().home
    database, made = home / "prefect.db", home / f".database-{prefect.__version__}"
    if database.exists() and made.exists():
        return
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / ".database.lock"):
        if not (database.exists() and made.exists()):
            asyncio.run(_migrate())
            made.touch()


async def _migrate() -> None:
    from prefect.server.database.dependencies import provide_database_interface

    interface = provide_database_interface()
    await interface.create_db()
    await (await interface.engine()).dispose()
