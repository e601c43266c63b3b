"""A stage's code version follows what it computes, through everything that it imports."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from tasks import code


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `tasks_fake` whose stage imports a helper inside a function."""
    package = tmp_path / "tasks_fake"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("def twice(x):\n    return 2 * x\n")
    (package / "stage.py").write_text(
        "def run(x):\n    from tasks_fake.helper import twice\n    return twice(x)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return package


def version() -> str:
    for cached in (code._source, code._imports, code._tree):
        cached.cache_clear()
    importlib.invalidate_caches()
    for name in [n for n in sys.modules if n.startswith("tasks_fake")]:
        del sys.modules[name]
    return code.code_version("tasks_fake.stage")


def test_a_changed_helper_changes_the_version(project: Path) -> None:
    before = version()
    (project / "helper.py").write_text("def twice(x):\n    return 3 * x\n")
    assert version() != before


def test_comments_docstrings_and_touching_do_not(project: Path) -> None:
    before = version()
    (project / "stage.py").touch()
    (project / "helper.py").write_text('def twice(x):\n    """Two x."""\n    return 2 * x  # why\n')
    assert version() == before


def test_the_stages_have_different_versions() -> None:
    names = ("mine", "score", "filter", "cluster", "train", "evaluate")
    assert len({code.code_version(f"tasks.{name}") for name in names}) == len(names)


def test_the_machinery_is_left_out() -> None:
    assert "tasks.store" in code._imports("tasks.mine")
    assert "tasks.store" not in code._closure("tasks.mine")
    assert "models.prompts" in code._closure("tasks.mine")
