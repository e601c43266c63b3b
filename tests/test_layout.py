"""Imports point one way: flows → tasks → models → constitutions; heavy ones wait until needed."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ("constitutions", "models", "tasks", "flows")
MODULES = sorted(p for package in ORDER for p in (ROOT / package).rglob("*.py"))


def imported(source: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(source.read_text("utf-8"))))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    return names | {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}


@pytest.mark.parametrize("module", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(module: Path) -> None:
    package = module.relative_to(ROOT).parts[0]
    above = ORDER[ORDER.index(package) + 1 :]
    climbing = {name for name in imported(module) if name.split(".")[0] in above}
    assert not climbing


def uses(source: Path, modules: frozenset[str]) -> set[str]:
    """The project's modules that a file imports, inside functions too; not when it is run."""
    found = set[str]()
    nodes = {
        n
        for block in ast.parse(source.read_text("utf-8")).body
        if not (isinstance(block, ast.If) and "__main__" in ast.unparse(block.test))
        for n in ast.walk(block)
    }
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {part if part in modules else node.module for part in parts}
    return found & modules


def test_no_two_modules_import_each_other() -> None:
    """Directly or through others; TYPE_CHECKING counts."""
    names = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
        for p in MODULES
    }
    known = frozenset(names)
    graph = {name: uses(path, known) - {name} for name, path in names.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" ← ".join(error.args[1]))


@pytest.mark.parametrize("module", ["flows.commands.cli", "tasks.rows", "models.prompts"])
def test_torch_is_not_imported_by(module: str) -> None:
    code = f"import {module}, sys; assert not {{'torch', 'mlflow', 'prefect'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_help_says_what_there_is() -> None:
    started = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-m", "flows.commands.cli", "--help"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout.decode()
    print(f"--help took {time.monotonic() - started:.2f} s")
    for command in ("run", "plan", "stage", "status", "constitution", "ask", "validate"):
        assert command in shown


def test_no_two_public_classes_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: found for name, found in places.items() if len(found) > 1}
