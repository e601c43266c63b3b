"""Who writes an experiment: one at a time, here and across machines, whatever becomes of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tasks.record import locks
from tasks.record.record import Record
from tasks.record.writer import CLAIM, _Claim, _Facts, made, writing

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from tasks.record.record import Record
from tasks.record.writer import writing
with writing(Record("e", Path(sys.argv[1])), "staple run e"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def process(home: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the experiment for so long, or waits to."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", HOLD, str(home), str(seconds)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(arguments, env=environment, text=True, **pipes) as started:  # type: ignore[call-overload]
        try:
            yield started
        finally:
            started.kill()


def said(started: subprocess.Popen[str], pipe: str = "stdout") -> str:
    stream = getattr(started, pipe)
    return str(stream.readline())


def claims(record: Record) -> list[str]:
    found = record.client.get_experiment(record.experiment_id)
    return [tag for tag in found.tags if tag.startswith(CLAIM)]


def test_a_run_holds_what_it_holds_and_another_name_is_free(workplace: Path) -> None:
    record, other = (Record(name, workplace / "home") for name in ("e", "f"))
    with writing(record, "staple run e"), writing(Record("e", workplace / "home"), "a part"):
        with writing(other, "staple run f"):
            assert len(claims(record)) == len(claims(other)) == 1
        assert made(record) is made(Record("e", workplace / "home"))
        assert claims(record), "a part that ends lets nothing go"
    assert claims(record) == claims(other) == []


@pytest.mark.parametrize("homes", ["one", "two"], ids=["one machine", "two machines"])
def test_a_second_process_waits_is_told_and_can_be_stopped(workplace: Path, homes: str) -> None:
    """Two homes share no lock: as on two machines, the record alone tells."""
    record = Record("e", workplace / "a")
    second = workplace / ("a" if homes == "one" else "b")
    with writing(record, "staple run e"):
        with process(second, 0) as waiting:
            told = said(waiting, "stderr")
            assert f"waiting for process {os.getpid()}: staple run e, on " in told
            assert "since" in told
            waiting.send_signal(signal.SIGINT)
            assert waiting.wait(timeout=600) == -signal.SIGINT
        assert len(claims(record)) == 1, "who was stopped claims nothing"
    with writing(Record("e", second), "staple run e"):
        assert len(claims(record)) == 1


def test_what_a_killed_process_held_is_free(workplace: Path) -> None:
    record = Record("e", workplace / "home")
    with process(workplace / "home", 600) as holder:
        assert said(holder) == "held\n"
        holder.kill()
    assert len(claims(record)) == 1
    with writing(record, "staple run e"):
        assert len(claims(record)) == 1, "the dead one's is taken away"


def test_a_dead_machines_claim_is_free_and_a_living_ones_is_not(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clocks an hour apart: a heartbeat that goes on tells, not the time that it says."""
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.2)
    record = Record("e", workplace / "here")
    client, number = record.client, record.experiment_id
    claim = {"place": "elsewhere:/", "pid": 1, "what": "staple run e", "held": True}

    def beat(passed: float) -> None:
        client.set_experiment_tag(
            number, f"{CLAIM}x", json.dumps({**claim, "beat": time.time() - 3600 + passed})
        )

    client.set_experiment_tag(number, f"{CLAIM}none-of-ours", "[")
    beat(0)
    entered = threading.Event()

    def enter() -> None:
        with writing(record, "staple run e"):
            entered.set()

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    for passed in range(30):
        beat(passed)
        assert not entered.wait(0.05)
    assert entered.wait(60), "no beat any more"
    thread.join(60)
    assert claims(record) == []


def test_a_heartbeat_that_could_not_be_read_is_not_missed(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow was away from both machines: the other one gets time to beat again."""
    claim = _Claim(Record("e", workplace / "here"), "staple run e")
    other = _Facts("elsewhere:/", 1, "staple run e", held=True, beat=time.time() - 3600)

    def is_alive(now: float) -> bool:
        monkeypatch.setattr("tasks.record.writer.time.monotonic", lambda: now)
        return claim._is_alive("writer.x", other)

    assert is_alive(0)
    assert is_alive(120), "the read hung for two minutes"
    assert all(is_alive(120 + passed) for passed in range(2, 30, 2))
    assert not is_alive(150), "half a minute without a beat"


def test_of_two_that_claim_at_once_one_has_it(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 2.0)
    both = [_Claim(Record("e", workplace / home), home) for home in ("a", "b")]
    for claim in both:
        claim.beat()  # both have written before either looks
    inside: list[_Claim] = []
    most = 0

    def enter(claim: _Claim) -> None:
        nonlocal most
        with locks.heartbeat(claim.beat):
            claim.take()
            inside.append(claim)
            most = max(most, len(inside))
            time.sleep(0.5)
            inside.remove(claim)
        claim.withdraw()

    threads = [threading.Thread(target=enter, args=(claim,), daemon=True) for claim in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert most == 1
