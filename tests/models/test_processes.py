"""The pool of processes: the same rows as from one process, and what happens when one is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil
import pytest

from constitutions.errors import UserError
from models.engine import threads
from models.policy import Progress
from models.pools.base import Where
from models.pools.processes import ProcessPool

SHARDS = {n: range(3 * n, 3 * n + 3) for n in range(12)}


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 2)


def open_engine(factor: int, _: Where) -> int:
    return factor


def multiply(engine: int, rows: Sequence[int], advance: Progress) -> list[tuple[int, int]]:
    advance(len(rows))
    return [(engine * row, os.getpid()) for row in rows]


def kill_at_seven(engine: int, rows: Sequence[int], advance: Progress) -> list[int]:
    if 21 in rows:
        os.kill(os.getpid(), signal.SIGKILL)
    return list(rows)


def refuse(engine: int, rows: Sequence[int], advance: Progress) -> list[int]:
    raise UserError("too many of them", where=f"shard {rows[0]}", fix="take fewer")


@pytest.mark.parametrize("worth", [2, 100])
def test_every_shard_is_computed_once(worth: int) -> None:
    ticks: list[int] = []
    with ProcessPool(partial(open_engine, 10), worth=worth) as pool:
        found = list(pool.map(multiply, SHARDS, ticks.append))
    rows = {done.number: [value for value, _ in done.rows] for done in found}
    assert rows == {n: [10 * row for row in shard] for n, shard in SHARDS.items()}
    assert sum(ticks) == 36
    processes = {pid for done in found for _, pid in done.rows}
    assert (os.getpid() in processes) == (worth == 100), "few shards are computed here"
    assert len(processes) <= 2 and not any(map(psutil.pid_exists, processes - {os.getpid()}))


def test_a_killed_process_is_told_and_what_is_finished_stays() -> None:
    finished: list[int] = []
    with (
        pytest.raises(UserError, match="a process that computes shards was killed"),
        ProcessPool(partial(open_engine, 1), worth=2) as pool,
    ):
        finished.extend(done.number for done in pool.map(kill_at_seven, SHARDS, lambda _: None))
    assert 7 not in finished


def test_an_error_of_the_users_arrives_as_it_is() -> None:
    with (
        pytest.raises(UserError, match=r"shard \d+: too many of them.*take fewer") as told,
        ProcessPool(partial(open_engine, 1), worth=2) as pool,
    ):
        list(pool.map(refuse, SHARDS, lambda _: None))
    assert told.value.fix == "take fewer"


SLOW = """
import sys, time
from pathlib import Path
from models.engine import threads
from models.pools.processes import ProcessPool

threads.cores = lambda: 2

def wait(engine, rows, advance):
    (Path(sys.argv[1]) / str(__import__("os").getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    with ProcessPool(str, worth=1) as pool:
        list(pool.map(wait, {n: [n] for n in range(4)}, lambda _: None))
"""


def test_its_processes_end_with_the_one_that_asked(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(textwrap.dedent(SLOW))
    place = tmp_path / "pids"
    place.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    asked = subprocess.Popen(
        [sys.executable, str(tmp_path / "slow.py"), str(place)], env=environment
    )
    deadline = time.monotonic() + 120
    while len(list(place.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    processes = [int(path.name) for path in place.iterdir()]
    asked.kill()
    asked.wait()
    assert len(processes) == 2
    while any(map(psutil.pid_exists, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, processes))
