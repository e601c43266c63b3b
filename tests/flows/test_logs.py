"""The log file of a run: all that was told, also in quiet; named where the run fails."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command import Ran, staple

from flows.experiment import home, open_experiment
from flows.logs import logged
from flows.schema import ExperimentSettings
from tasks.record import progress


def stage(capsys: pytest.CaptureFixture[str], name: str, *more: str) -> Ran:
    return staple(capsys, "stage", name, "--experiment", "lineage", "--iteration", "1", *more)


@pytest.mark.usefixtures("prefect_server")
def test_what_a_stage_says_is_in_its_log(
    at_home: ExperimentSettings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failed = stage(capsys, "train", "--set", "train.max_tokens=16")
    assert failed.code == 2
    named = re.search(r"^The log of this run: (.*)$", failed.err, re.MULTILINE)
    assert named
    text = Path(named[1]).read_text()
    message = failed.err.partition("\n")[0].removeprefix("staple: ")
    assert "Traceback" in text and message[:60] in text

    done = "✓ filter 1 ·"
    assert done in stage(capsys, "filter", "--force").err
    monkeypatch.setattr(progress._shown, "quiet", False)  # undone with the test
    quiet = stage(capsys, "filter", "--force", "--quiet")
    assert quiet.code == 0 and not quiet.err
    newest = max(Path(".staple/logs").iterdir(), key=lambda path: path.stat().st_mtime)
    assert done in newest.read_text()


def test_a_traceback_holds_no_password(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError), logged("e"):
        raise RuntimeError("no answer from http://somebody:S3CR3T@host:5000/api")
    (log,) = (home() / "logs").iterdir()
    assert "http://***@host:5000/api" in log.read_text() and "S3CR3T" not in log.read_text()


def test_training_shows_its_steps_also_under_a_budget_of_tokens(
    at_home: ExperimentSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    ran = stage(capsys, "train", "--set", "train.tokens=3000", "--set", "train.batch_size=2")
    steps = open_experiment(at_home).record.needs("train", 1).metrics["train/steps"]
    assert steps > 1 and re.search(rf"^train 1 .*: 1/{steps:.0f} steps$", ran.err, re.MULTILINE)
