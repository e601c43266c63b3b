"""A short run of `benchmarks.kills`: SIGKILL at random moments loses and changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import small_loop
from servers import prefect_api

from benchmarks.kills import measure


def test_killed_and_resumed_is_as_never_killed(
    tmp_path: Path,
    migrated_database: Path,
    prefect_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_loop.make(tmp_path, migrated_database)
    shutil.copytree(prefect_home, tmp_path / "prefect")
    with prefect_api(tmp_path) as server:  # a temporary one for each run takes most of the time
        monkeypatch.setenv("PREFECT_API_URL", server.url)
        command = ["flows.commands.cli", "run", str(tmp_path / "lineage.yaml")]
        outcome = measure(tmp_path, command, "lineage", kills=3, seed=2)
    assert outcome.attempts == 9
    assert outcome.differ == ()
    assert outcome.twice == 0
    assert sum(kill.stage != "none" for kill in outcome.kills) >= 2, "the kills hit something"
