"""Two servers that start at once for the first time, as two users of one machine have them."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWN = """\
import os
from pathlib import Path
from flows.server.prefect_database import file, make, own
os.environ |= own(Path(os.environ["STAPLE_HOME"]))
import prefect.context
prefect.context.refresh_global_settings_context()
"""
MAKE, FILE = OWN + "make()", OWN + "print(file())"


def test_two_first_starts_make_one_database(tmp_path: Path) -> None:
    """A later one, in another folder, gets a copy of it, which needs no migration."""
    first = place(tmp_path, "first")
    both = [python(MAKE, first), python(MAKE, first)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    no_other = python(
        f"import alembic.op as op; del op.create_table\n{MAKE}", place(tmp_path, "second")
    )
    assert no_other.wait() == 0, no_other.communicate()
    found = [tables(tmp_path / name / "prefect.db") for name in ("first", "second")]
    assert found[0] == found[1] and len(found[0]) > 20


def place(folder: Path, name: str) -> dict[str, str]:
    """The environment of a server whose own folder has this name, with an empty cache."""
    bare = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    cache = {"XDG_CACHE_HOME": str(folder / "cache"), "HOME": str(folder), "PYTHONPATH": str(ROOT)}
    return {**bare, **cache, "STAPLE_HOME": str(folder / name)}


def python(code: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def tables(file: Path) -> set[tuple[str]]:
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("select count(*) from alembic_version").fetchone() == (1,)
        return set(database.execute("select name from sqlite_master"))


@pytest.mark.parametrize(
    ("chosen", "file"),
    [
        ({}, "home/prefect.db"),
        ({"PREFECT_HOME": "mine"}, "mine/prefect.db"),
        ({"PREFECT_API_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:///a.db"}, "a.db"),
    ],
)
def test_a_folder_has_a_database_of_its_own_unless_the_user_chose_one(
    tmp_path: Path, chosen: dict[str, str], file: str
) -> None:
    shown = python(FILE, {**place(tmp_path, "home"), **chosen})
    assert shown.communicate()[0].strip().endswith(file)
    mine = tmp_path / ".prefect/profiles.toml"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text(
        'active = "p"\n[profiles.p]\n'
        'PREFECT_SERVER_DATABASE_CONNECTION_URL = "sqlite+aiosqlite:///b.db"\n'
    )
    if not chosen:
        assert python(FILE, place(tmp_path, "home")).communicate()[0].strip() == "b.db"
