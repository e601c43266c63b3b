"""`staple up` where it cannot start, and what it costs where nothing is up. `tests/ui` has the rest."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from command import staple

from flows.server import services


def test_a_port_that_is_taken_is_named_with_its_holder(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        ran = staple(capsys, "up", "--port", str(port))
    assert ran.code == 2
    assert f"port {port} is taken by" in ran.err
    assert f"process {os.getpid()}" in ran.err
    assert not services.down()


def test_a_service_that_ends_at_its_start_shows_why_and_takes_the_others_with_it(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mysql+pymysql://127.0.0.1:1/none")  # no such driver
    monkeypatch.setenv("PREFECT_HOME", str(workplace / "prefect"))
    ran = staple(capsys, "up")
    services.down()
    assert ran.code == 2
    assert "mlflow ended at its start" in ran.err
    assert "pymysql" in ran.err
    marked = [p for p in psutil.process_iter() if str(workplace) in started_in(p)]
    assert not marked


def test_a_process_that_got_the_id_of_a_service_is_left_alone(workplace: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    noted = {"name": "cpu", "mark": "cpu-0", "pid": other.pid, "log": "", "url": ""}
    folder = workplace / ".staple" / "services"
    folder.mkdir(parents=True)
    (folder / "services.json").write_text(json.dumps([noted]))
    try:
        assert services.down() == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_command_without_services_pays_nothing_for_them(workplace: Path) -> None:
    took = []
    for _ in range(5):  # another process may have the processor for a while
        started = time.perf_counter()
        services.adopt()
        took.append(time.perf_counter() - started)
    assert min(took) < 0.02


def started_in(process: psutil.Process) -> str:
    try:
        return (
            process.environ().get("STAPLE_HOME", "") if process.environ().get(services.MARK) else ""
        )
    except (psutil.Error, OSError):
        return ""


@pytest.mark.parametrize("content", ["", "[", "null", '[{"name": "prefect"}]', "\udcff"])
def test_what_runs_is_found_though_its_note_is_damaged(
    workplace: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`staple down` ends it, and nothing of another home."""
    folder = workplace / ".staple" / "services"
    folder.mkdir(parents=True)
    (folder / "services.json").write_text(content, errors="surrogateescape")
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    ours, others = (
        subprocess.Popen(
            command,
            env={
                **os.environ,
                services.MARK: f"prefect-{number}",
                services.URL: "http://127.0.0.1:1",
                "STAPLE_HOME": home,
            },
        )
        for number, home in enumerate((str(workplace / ".staple"), "/elsewhere"))
    )
    try:
        assert services.down() == ["prefect"]
        assert not psutil.pid_exists(ours.pid)
        assert others.poll() is None
    finally:
        for process in (ours, others):
            process.kill()
            process.wait()
    said = capsys.readouterr().err
    assert "services.json is damaged" in said and "running services: prefect" in said
    assert services.down() == []
    assert "damaged" not in capsys.readouterr().err
