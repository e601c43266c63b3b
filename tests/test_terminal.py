"""What a person sees of a run on a terminal of 80 and of 40 columns, with a Ctrl-C between, and piped.

The stages are real, and run as `staple run` runs them but for Prefect's server, which shows nothing.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
import small_loop

from flows.announce import announced_steps
from flows.experiment import open_experiment
from flows.settings import load_settings
from tasks.record.progress import Pace, duration

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
from flows.commands.program import watched
from flows.experiment import note_settings, open_experiment
from flows.settings import load_settings
from flows.announce import announced_steps
from tasks.record import interruption

def work():
    settings = load_settings("lineage.yaml", ["shard_size=1"])
    note_settings(settings)
    interruption.note(command="staple run lineage --resume")
    experiment = open_experiment(settings)
    for t in (0, 1):
        for attempt in announced_steps(experiment, t):
            if attempt.stage == "mine":
                return

sys.exit(watched(work))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Path:
    """A small experiment of which nothing is computed yet."""
    place = tmp_path_factory.mktemp("terminal")
    small_loop.make(place, migrated_database)
    return place


def on_terminal(folder: Path, columns: int, enough: Callable[[str], object]) -> tuple[int, str]:
    """Run it on a pseudo-terminal, with Ctrl-C once `enough`; its exit code and what it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    own = {"STAPLE_HOME": str(folder / ".staple"), "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env={**environment, **own},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    written, stopped = b"", False
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        written += part
        if not stopped and enough(plain(written)):
            process.send_signal(signal.SIGINT)
            stopped = True
    os.close(ours)
    return process.wait(timeout=600), plain(written)


def plain(written: bytes) -> str:
    """Without the terminal's controls; what overwrote a line begins a new one."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode("utf-8", "ignore"))
    return text.replace("\r", "\n")


def lines(text: str, beginning: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(beginning)]


def test_a_run_on_a_terminal_stopped_and_continued(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown = on_terminal(folder, 80, lambda text: re.search(r"mine 1 .*?[1-9]\d*/", text))
    assert code == 128 + signal.SIGINT
    assert "iteration 1 of 1, stage 2 of 7: mine" in shown
    assert re.search(r"✓ evaluate 0 · [\d.:]+( s)? · win rate 0\.\d\d", shown)
    (last,) = lines(shown, "staple: ")
    kept = r"staple: stopped: \d of 6 shards of mine 1 are kept; continue with: "
    assert re.fullmatch(kept + "staple run lineage --resume", last)

    code, shown = on_terminal(folder, 40, lambda _: False)
    assert code == 0
    assert lines(shown, "✓ evaluate 0") == ["✓ evaluate 0 · reused · win rate 0.50"]
    done = lines(shown, "✓ ")
    assert [line.split()[1] for line in done] == ["prompts", "evaluate", "prompts", "mine"]
    assert done[-1].endswith("· 18 candidates")
    assert max(map(len, shown.splitlines())) <= 40

    monkeypatch.chdir(folder)
    monkeypatch.setenv("STAPLE_HOME", str(folder / ".staple"))
    stages = announced_steps(open_experiment(load_settings("lineage.yaml")), 1)
    assert [next(stages).stage, next(stages).stage] == ["prompts", "mine"]
    said = capsys.readouterr().err.splitlines()
    assert said == ["✓ prompts 1 · reused · 6 prompts", "✓ mine 1 · reused · 18 candidates"]


def test_the_time_left_follows_from_the_rate_beside_it() -> None:
    now = 0.0
    pace = Pace("mine 1", 1000, "requests", clock=lambda: now)
    pace.advance(400)  # an earlier attempt had finished them
    now = 300.0  # a model is loaded, the first batch is filled
    pace.advance(20)
    assert pace.left is None and str(pace) == "420/1,000 requests"
    now = 310.0
    pace.advance(20)
    assert pace.rate == pytest.approx(2)
    assert pace.left == pytest.approx(280)
    assert str(pace) == "440/1,000 requests · 2.0/s · 0:04:40 left"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(7.46, "7.5 s"), (59.96, "0:01:00"), (100, "0:01:40"), (61_200, "17:00:00")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
