"""The version of a stage's code: what it would compute, not how its source is laid out.

`store` puts it into every fingerprint, so that a change to a stage, or to anything of this project
that the stage imports, makes the stage compute again. Comments, docstrings and formatting do not.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from functools import cache
from pathlib import Path

from constitutions.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
"""Where this project's packages lie, whatever else is on the search path."""
PACKAGES = ("tasks", "models", "constitutions")
MACHINERY = frozenset(
    {
        "tasks.record.store",
        "tasks.record.work",
        "tasks.record.locks",
        "tasks.record.stage",
        "tasks.record.code",
        "tasks.record.progress",
    }
    | {
        "tasks.record.tables",
        "models.files",
        "models.pools.base",
        "models.pools.local",
        "models.pools.opening",
        "models.pools.ray_cluster",
        "models.pools.weights",
    }
)
"""How results are kept and shown, and where they are computed: a change here changes none."""


def code_version(module: str) -> str:
    """sha256 over the syntax trees of a module and of the project's modules that it imports.

    Raises:
        UserError: Python would run, or has run, another file of the same name instead.
    """
    digest = hashlib.sha256()
    for name in sorted(_closure(module)):
        _check_is_ours(name)
        digest.update(f"{name}:{_tree(name)}\n".encode())
    return digest.hexdigest()


def _closure(module: str) -> set[str]:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [n for n in _imports(name) if n not in MACHINERY]
    return seen


@cache
def _source(module: str) -> Path | None:
    """The file of one of the project's modules; nothing is imported (torch takes seconds).

    A stage of one's own lies elsewhere: where it was loaded from.
    """
    if not _is_of_project(module):
        file = getattr(sys.modules.get(module), "__file__", None)
        return Path(file).resolve() if file else None
    place = ROOT.joinpath(*module.split("."))
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.is_file():
            return file
    return None  # `from package.module import name`: name is no module


def _is_of_project(module: str) -> bool:
    return module.split(".")[0] in PACKAGES


@cache
def _check_is_ours(module: str) -> None:
    """Refuse to vouch for code that is not what runs: `tasks` is a common name for a folder.

    What is not loaded yet is looked for, as the import will.
    """
    source = _source(module)
    loaded = sys.modules.get(module)
    spec = loaded.__spec__ if loaded else importlib.util.find_spec(module)
    found = spec.origin if spec else None
    if source and found and Path(found).resolve() == source.resolve():
        return
    raise UserError(
        f"Python takes {module} from {found or 'nowhere'}, not from this project",
        where=f"sys.path, {_entry(found)}" if found else "sys.path",
        expected=str(source or ROOT.joinpath(*module.split("."))),
        fix="take that folder off PYTHONPATH, rename it, or run staple elsewhere",
    )


def _entry(file: str) -> str:
    """The entry of the search path below which a file lies."""
    above = [entry for entry in sys.path if Path(file).is_relative_to(Path(entry).absolute())]
    return max(above, key=len, default=file)


@cache
def _imports(module: str) -> frozenset[str]:
    """The project's modules that are imported anywhere in a module, inside functions too."""
    source = _source(module)
    if source is None:
        return frozenset()
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(name for name in found if _is_of_project(name) and _source(name))


@cache
def _tree(module: str) -> str:
    source = _source(module)
    if source is None:
        return ""
    tree = ast.parse(source.read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            del body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
