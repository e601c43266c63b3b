"""A command that finds everything in the record imports nothing that only computing needs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from flows.experiment import open_experiment, writing
from flows.publish import Attempts, publish_experiment
from flows.schema import ExperimentSettings
from flows.states import stage_states, unchanged

ROOT = Path(__file__).parents[2]
HEAVY = {
    *("matplotlib", "prefect", "sklearn", "torch", "transformers"),
    *("alembic", "mlflow", "pandas", "scipy", "sqlalchemy"),
}
"""What only computing, writing the record, a server or a figure needs; without Prefect no server
can start."""
CODE = f"""
import sys
from flows.commands.cli import main
try:
    main()
finally:
    print("imported:", *sorted({HEAVY} & set(sys.modules)))
"""


@pytest.fixture
def published(at_home: ExperimentSettings) -> ExperimentSettings:
    """The finished experiment, with its summary in MLflow."""
    done: defaultdict[int, Attempts] = defaultdict(dict)
    for (stage, t), state in stage_states(at_home).items():
        assert state.attempt is not None
        done[t][stage] = state.attempt
    publish_experiment(open_experiment(at_home), [done[t] for t in sorted(done)])
    return at_home


READING = (
    "status lineage",
    "run lineage.yaml",
    "list",
    "constitution show lineage",
    "compare lineage:0 lineage:1",
)


@pytest.mark.parametrize("words", READING)
def test_what_the_record_has_is_only_read(published: ExperimentSettings, words: str) -> None:
    """No library is imported that computes, or writes the record; no lock is waited for."""
    assert unchanged(published), "there is nothing to compute"
    with writing(published.experiment, "another run"):
        shown = command(words)
    if words.startswith("run"):
        assert "0 stages computed" in shown
    assert shown.splitlines()[-1] == "imported:"


@pytest.mark.parametrize("words", ["report nobody", "run lineage.yaml --set mine.sample=3"])
@pytest.mark.usefixtures("at_home")
def test_a_mistake_is_told_before_anything_is_imported(words: str) -> None:
    assert command(words, code=2).splitlines()[-1] == "imported:"


def command(words: str, code: int = 0) -> str:
    """What a command prints, and then which heavy libraries it imported."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words.split()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    return done.stdout
