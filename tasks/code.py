"""The version of a stage's code: what it would compute, not how its source is laid out.

`store` puts it into every fingerprint, so that a change to a stage, or to anything of this project
that the stage imports, makes the stage compute again. Comments, docstrings and formatting do not.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from functools import cache
from pathlib import Path

PACKAGES = ("tasks", "models", "constitutions")
MACHINERY = frozenset(
    {"tasks.store", "tasks.work", "tasks.locks", "tasks.stage", "tasks.code", "tasks.progress"}
    | {"models.pool", "models.cluster", "models.weights"}
)
"""How results are kept and shown, and where they are computed: a change here changes none."""


def code_version(module: str) -> str:
    """sha256 over the syntax trees of a module and of the project's modules that it imports."""
    digest = hashlib.sha256()
    for name in sorted(_closure(module)):
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
    """The file of one of the project's modules; nothing is imported (torch takes seconds)."""
    package, *parts = module.split(".")
    if not package.startswith(PACKAGES):
        return None
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or [] if spec else []:
        place = Path(folder, *parts)
        for file in (place.with_suffix(".py") if parts else place, place / "__init__.py"):
            if file.is_file():
                return file
    return None  # `from package.module import name`: name is no module


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
    return frozenset(name for name in found if _source(name))


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
