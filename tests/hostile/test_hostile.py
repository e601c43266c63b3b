"""Hostile command lines, settings, constitutions and data: one message each, within limits.

Each input of `tables.CASES` runs in a process of its own (`warm`): no traceback, no exit but the one
that is stated, no terminal control and no password in what is printed, no more than a gigabyte.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hostile.cases import SECRET, Case
from hostile.tables import CASES, KINDS

ROOT = Path(__file__).parent.parent.parent
LONGEST = 40_000
"""Characters that a person is shown at most."""


@pytest.fixture(scope="session")
def ended(
    tmp_path_factory: pytest.TempPathFactory, migrated_database: Path
) -> dict[str, dict[str, Any]]:
    """How each case ended, by its name."""
    place = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, str(ROOT / "tests/hostile/warm.py"), str(migrated_database)]
    run = subprocess.run(
        [*command, str(place), str(place / "results.json")],
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "160"},
        capture_output=True,
    )
    assert run.returncode == 0, run.stderr.decode("utf-8", "replace")[-3000:]
    found: dict[str, dict[str, Any]] = json.loads((place / "results.json").read_text("utf-8"))
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_message(case: Case, ended: dict[str, dict[str, Any]]) -> None:
    run = ended[case.name]
    shown = run["out"] + run["err"]
    assert not run["late"], "it did not end"
    assert run["code"] == case.code, shown[-2000:]
    assert "Traceback" not in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    assert SECRET not in shown
    assert len(shown) < LONGEST
    assert run["growth"] < 1 << 30
    assert case.says.lower() in shown.lower()
    if case.code:
        assert run["err"].strip(), "it says why"


def test_there_are_inputs_of_all_kinds() -> None:
    counts = {kind: len(cases) for kind, cases in KINDS.items()}
    least = {"command line": 100, "settings": 80, "constitutions": 60, "data": 60}
    assert all(counts[kind] >= count for kind, count in least.items()), counts
    assert max(Counter(case.name for case in CASES).values()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["status", "a\x1b[31mb"], "nothing is recorded"),
        (["up", "--port", "99999"], "65535"),
        (["validate", "a[/green].yaml"], "a[/green].yaml"),
        (["validate", "planted", "--set", "policy.endpoint=http://h:99999/"], "Port"),
        (["validate", "planted", "--set", "iterations=[1"], "iterations"),
    ],
    ids=["a name", "a port", "markup", "an endpoint", "no YAML"],
)
def test_the_command_itself(arguments: list[str], said: str, tmp_path: Path) -> None:
    """As people start it, and not as a child of a process that has imported everything."""
    run = subprocess.run(
        [sys.executable, "-m", "flows.commands.cli", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"},
        cwd=tmp_path,
        capture_output=True,
    )
    assert run.returncode == 2
    assert said in run.stderr.decode()
    assert "\x1b" not in run.stderr.decode() and "Traceback" not in run.stderr.decode()
