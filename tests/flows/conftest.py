"""A finished small experiment, once for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import small_loop

from flows.experiment import note_settings
from flows.settings import ExperimentSettings


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Path:
    """A folder with a model, rows and a record."""
    folder = tmp_path_factory.mktemp("lineage")
    small_loop.make(folder, migrated_database)
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
