"""A stage's code version follows what it computes, through everything that it imports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from constitutions.errors import UserError
from tasks.record import code

PACKAGE = Path(code.__file__).parents[1]
IMPORT = "from tasks.record.code import code_version, code_versions; "
VERSION = f"{IMPORT}print(code_version('tasks.own'))"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The packages of a project whose stage imports a helper inside a function."""
    tasks, errors = tmp_path / "project" / "tasks", tmp_path / "project" / "constitutions"
    for package in (tasks, tasks / "record", errors):
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    shutil.copy(PACKAGE / "record" / "code.py", tasks / "record")
    for name in ("errors.py", "untrusted.py"):
        shutil.copy(PACKAGE.parent / "constitutions" / name, errors)
    (tmp_path / "project" / "models").mkdir()
    shutil.copy(PACKAGE.parent / "models" / "files.py", tmp_path / "project" / "models")
    (tasks / "helper.py").write_text("def twice(x):\n    return 2 * x\n")
    (tasks / "own.py").write_text(
        "def run(x):\n    from tasks.helper import twice\n    return twice(x)\n"
    )
    return tmp_path / "project"


def version(project: Path, *before: Path, script: str = VERSION) -> str:
    """What a process says whose search path has other folders before the project."""
    search = os.pathsep.join(map(str, (*before, project)))
    ran = subprocess.run(
        [sys.executable, "-S", "-c", script],
        cwd="/",
        env={"PYTHONPATH": search, "XDG_CACHE_HOME": str(project / "cache")},
        capture_output=True,
        text=True,
    )
    return ran.stdout.strip() or ran.stderr.strip().splitlines()[-1]


def test_a_changed_helper_changes_the_version(project: Path) -> None:
    before = version(project)
    (project / "tasks" / "helper.py").write_text("def twice(x):\n    return 3 * x\n")
    assert len(before) == len(version(project)) == 64
    assert version(project) != before


def test_a_file_is_parsed_once_and_again_where_the_memory_is_damaged(project: Path) -> None:
    again = f"import ast; ast.parse = None; {VERSION}"
    assert "not callable" in version(project, script=again), "nothing is remembered yet"
    before = version(project)
    assert version(project, script=again) == before
    for kept in (project / "cache/staple/code").iterdir():
        kept.write_text(kept.read_text()[:-1] + "?")
    assert version(project) == before == version(project, script=again)


def test_comments_docstrings_and_touching_do_not(project: Path) -> None:
    before = version(project)
    (project / "tasks" / "own.py").touch()
    (project / "tasks" / "helper.py").write_text(
        'def twice(x):\n    """Two x."""\n    return 2 * x  # why\n'
    )
    assert version(project) == before


EDITABLE = """
import sys
from importlib.machinery import PathFinder

class Editable:  # as setuptools installs a checkout: asked after the search path
    @staticmethod
    def find_spec(name, path=None, target=None):
        parent, _, _ = name.rpartition(".")
        if name in ("tasks", "models", "constitutions"):
            return PathFinder.find_spec(name, [sys.argv[1]])
        return PathFinder.find_spec(name, [f"{sys.argv[1]}/{parent}"]) if parent else None

sys.meta_path.append(Editable)
import tasks.own
from tasks.record.code import code_version
print(code_version("tasks.own"))
"""


@pytest.mark.parametrize("regular", [True, False], ids=["package", "folder"])
def test_a_folder_of_the_same_name_hides_nothing(
    project: Path, tmp_path: Path, regular: bool
) -> None:
    """The version of what runs, or a refusal; never that of nothing."""
    other = tmp_path / "other" / "tasks"
    other.mkdir(parents=True)
    if regular:
        (other / "__init__.py").touch()

    def shadowed() -> str:
        ran = subprocess.run(
            [sys.executable, "-S", "-c", EDITABLE, str(project)],
            cwd="/",
            env={"PYTHONPATH": str(other.parent)},
            capture_output=True,
            text=True,
        )
        return ran.stdout.strip() or ran.stderr.strip().splitlines()[-1]

    assert shadowed() == version(project), "all that runs is the project's own"
    (other / "helper.py").write_text("def twice(x):\n    return 3 * x\n")
    said = shadowed()
    assert "UserError" in said and "tasks.helper" in said
    assert str(other) in said and f"sys.path, {other.parent}" in said and "PYTHONPATH" in said


def test_a_stage_of_ones_own_is_covered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_stage.py").write_text("def run(x):\n    return x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="my_stage"):
        code.code_version("my_stage")  # not loaded: nobody knows what it would be
    import my_stage

    assert my_stage.run(1) == 1
    code._source.cache_clear()
    assert code.code_version("my_stage") != code.code_version("tasks.mine")


def test_the_stages_have_different_versions() -> None:
    names = ("mine", "score", "filter", "cluster", "train", "evaluate")
    assert len({code.code_version(f"tasks.{name}") for name in names}) == len(names)


def test_what_a_registry_lists_counts_where_it_is_named(project: Path) -> None:
    tasks = project / "tasks"
    (tasks / "registry.py").write_text("from tasks import first, second\n")
    (tasks / "first.py").write_text("from tasks.helper import twice\n")
    (tasks / "second.py").write_text("x = 2\n")
    (tasks / "own.py").write_text("from tasks.registry import first\n")
    names = f"{IMPORT}print(*code_versions('tasks.own', 'tasks.first'))"
    assert version(project, script=names) == "tasks.first tasks.helper tasks.own tasks.registry"
    assert version(project, script=f"{IMPORT}print(*code_versions('tasks.own'))") == (
        "tasks.own tasks.registry"
    )


def test_a_text_counts_where_it_is_noted(project: Path) -> None:
    helper = project / "tasks" / "helper.py"
    helper.write_text("from x import Rubric\nKIND = Rubric(text='a')\ndef twice(x): return 2 * x\n")
    before = version(project)
    helper.write_text(helper.read_text().replace("'a'", "'b'"))
    assert version(project) == before


def test_what_only_keeps_results_is_left_out() -> None:
    found = code.code_versions("tasks.mine")
    assert "models.prompts" in found
    assert not [name for name in found if name.startswith(("tasks.record", "models.pools"))]
