"""Ctrl-C, SIGTERM and SIGKILL at any moment: one line, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import small_loop

from flows.commands.program import GRACE_SECONDS
from tasks.record.work import JOURNAL

ROOT = Path(__file__).parent.parent
Process = subprocess.Popen[bytes]
LONG = 400  # seconds that nothing here takes unless it hangs


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, migrated_database: Path, prefect_home: Path
) -> Path:
    """A small experiment whose stages have several shards."""
    place = tmp_path_factory.mktemp("signals")
    small_loop.make(place, migrated_database)
    shutil.copytree(prefect_home, place / "prefect")
    return place


PROGRAM = (
    "import sys; from flows.commands import program; program.GRACE_SECONDS = {}; program.main()"
)


def staple(folder: Path, *arguments: str, grace: float = GRACE_SECONDS) -> Process:
    """Start the program as a shell does, in a process group of its own.

    Args:
        grace: seconds to end in order; many, where a test looks at what was put in order.
    """
    foreign = ("PREFECT_API", "MLFLOW_TRACKING")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    own = {
        "PREFECT_HOME": str(folder / "prefect"),
        "STAPLE_HOME": str(folder / ".staple"),
        "PYTHONPATH": str(ROOT),
    }
    with (folder / "output.txt").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(grace), *arguments],
            cwd=folder,
            env={**kept, **own},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def processes(folder: Path) -> list[psutil.Process]:
    """All that runs for this folder, wherever it stands in the tree."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("PREFECT_HOME") == str(folder / "prefect")
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def until(is_so: Callable[[], object], process: Process | None = None) -> None:
    deadline = time.monotonic() + LONG
    while not is_so():
        assert process is None or process.poll() is None, "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def events(folder: Path, name: str) -> list[dict[str, object]]:
    path = folder / ".staple" / "work" / JOURNAL
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["event"] == name]


def ended(folder: Path, process: Process) -> str:
    """Wait for its end: the one line that it says, after which nothing of it is left."""
    process.wait(timeout=LONG)
    assert not processes(folder)
    output = (folder / "output.txt").read_text()
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("staple: ")]
    assert output.endswith(f"{line}\n"), "the last thing that it says"
    return line


@pytest.mark.parametrize(
    ("number", "seconds"),
    [
        (signal.SIGINT, 0.0),
        (signal.SIGTERM, 0.1),
        (signal.SIGINT, 0.4),
        (signal.SIGTERM, 1.5),
        (signal.SIGINT, 4.0),
    ],
)
def test_in_the_first_seconds(folder: Path, seconds: float, number: signal.Signals) -> None:
    process = staple(folder, "run", "lineage.yaml")
    until(lambda: listens(process.pid), process)
    time.sleep(seconds)
    os.killpg(process.pid, number)
    assert "continue with: staple run" in ended(folder, process)
    assert process.returncode == 128 + number


def listens(pid: int) -> bool:
    """Whether the program handles SIGTERM: Python by itself does not."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_ctrl_c_while_the_server_starts(folder: Path) -> None:
    process = staple(folder, "run", "lineage.yaml")
    until(
        lambda: any("flows.server.prefect_server" in p.cmdline() for p in processes(folder)),
        process,
    )
    os.killpg(process.pid, signal.SIGINT)
    assert "continue with: staple run lineage --resume" in ended(folder, process)
    assert process.returncode == 130


def mining(folder: Path, tokens: int, *, grace: float = GRACE_SECONDS) -> Process:
    """A run that has finished its first shard of mining, of six that take seconds each.

    It imports libraries before that, and torch ignores an interrupt that falls into its import.

    Args:
        tokens: about 200, and another number in each test, so that mining begins anew.
    """
    before = mined(folder)
    settings = ["shard_size=1", f"mine.max_response_tokens={tokens}"]
    changes = [argument for setting in settings for argument in ("--set", setting)]
    process = staple(folder, "run", "lineage.yaml", *changes, grace=grace)
    until(lambda: mined(folder) > before, process)
    return process


def mined(folder: Path) -> int:
    """The shards of mining that the journal of all experiments lists."""
    return len([event for event in events(folder, "shard") if "mined" in str(event["name"])])


def test_what_is_kept_is_told_and_marked(folder: Path) -> None:
    process = mining(folder, 200, grace=LONG)
    os.killpg(process.pid, signal.SIGINT)
    line = ended(folder, process)
    assert process.returncode == 130
    assert f"stopped: {mined(folder)} of 6 shards of mine 1 are kept" in line
    assert "continue with: staple run lineage --resume" in line
    with sqlite3.connect(folder / "mlflow.db") as database:
        (status,) = database.execute("SELECT status FROM runs WHERE name = 'mine 1'").fetchone()
    assert status == "KILLED"
    with sqlite3.connect(folder / "prefect" / "prefect.db") as database:
        (state,) = database.execute(
            "SELECT state_type FROM flow_run WHERE name = 'lineage' ORDER BY created DESC"
        ).fetchone()
    assert state == "CRASHED"


def test_sigterm_to_the_program_alone(folder: Path) -> None:
    process = mining(folder, 199)
    process.terminate()
    assert "kept; continue with: staple run lineage --resume" in ended(folder, process)
    assert process.returncode == 143


def test_sigkill_leaves_no_server(folder: Path) -> None:
    process = mining(folder, 198)
    process.kill()
    process.wait()
    until(lambda: not processes(folder))


BUSY = """
    import os, sys
    from flows.commands import program
    program.GRACE_SECONDS = float(sys.argv[1])
    def work():
        print("begun", flush=True)
        sum(range(10**12))  # one call, hours long, that no signal interrupts
    sys.exit(program.watched(work))
"""


def busy(grace: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(BUSY), str(grace)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    return process


def test_a_library_that_hears_nothing_is_ended() -> None:
    with busy(0.5) as process:
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=LONG)
    assert process.returncode == 130
    assert said.startswith("staple: stopped: what was finished is kept; continue with: staple")


def test_a_second_ctrl_c_ends_at_once() -> None:
    with busy(10 * LONG) as process:
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=LONG)
    assert process.returncode == 130


def test_the_exit_code_is_the_commands(tmp_path: Path) -> None:
    process = staple(tmp_path, "status", "nowhere")
    assert process.wait(timeout=LONG) == 2
    assert "Traceback" not in (tmp_path / "output.txt").read_text()
