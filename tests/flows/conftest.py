"""A finished small experiment: computed once, copied for each module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import small_loop

from flows.experiment import note_settings
from flows.schema import ExperimentSettings


@pytest.fixture(scope="module")
def made(lineage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of it that the tests of a module may change."""
    folder = tmp_path_factory.mktemp("lineage")
    small_loop.copy_finished(lineage, folder)
    return folder


@pytest.fixture
def at_home(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ExperimentSettings]:
    """The experiment, finished with its own settings; a test may change what it likes."""
    monkeypatch.chdir(made)
    monkeypatch.setenv("STAPLE_HOME", str(made / ".staple"))
    settings = small_loop.finished()
    yield settings
    note_settings(settings)


@pytest.fixture
def taught(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ExperimentSettings]:
    """The same of SAMI."""
    monkeypatch.chdir(made)
    monkeypatch.setenv("STAPLE_HOME", str(made / ".staple"))
    settings = small_loop.finished("taught")
    yield settings
    note_settings(settings)
