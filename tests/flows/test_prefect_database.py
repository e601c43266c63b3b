"""Two servers that start at once for the first time, as two users of one machine have them."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_two_first_starts_make_one_database(tmp_path: Path) -> None:
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "from flows.server.prefect_database import make; make()"]
    both = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    with closing(sqlite3.connect(tmp_path / "prefect.db")) as database:
        assert database.execute("select count(*) from alembic_version").fetchone() == (1,)
