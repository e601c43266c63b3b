"""A short run of `benchmarks.kills`: SIGKILL at random moments loses and changes nothing."""

from __future__ import annotations

from pathlib import Path

import small_loop

from benchmarks.kills import measure


def test_killed_and_resumed_is_as_never_killed(tmp_path: Path, migrated_database: Path) -> None:
    small_loop.make(tmp_path, migrated_database)
    outcome = measure(tmp_path, ["run", str(tmp_path / "lineage.yaml")], "lineage", kills=3, seed=2)
    assert outcome.attempts == 9
    assert outcome.differ == ()
    assert outcome.twice == 0
    assert sum(kill.stage != "none" for kill in outcome.kills) >= 2, "the kills hit something"
