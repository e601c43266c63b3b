"""The version of a stage's code: what it would compute, not how its source is laid out.

A stage's fingerprint holds a digest of each module that its outputs depend on: the stage's own
module, the modules that its settings chose (`Slot.uses`), and all that these import. Comments,
docstrings and formatting do not count. See docs/resume.md.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from constitutions.errors import UserError
from models.files import bytes_sha256, recall, remember, text_sha256, user_cache

ROOT = Path(__file__).resolve().parents[2]
"""Where this project's packages lie, whatever else is on the search path."""
PACKAGES = ("tasks", "models", "constitutions")
APART = (
    *("tasks.record", "tasks.report", "models.pools", "models.files", "models.notices"),
    *("constitutions.errors", "models.checkpoints", "tasks.policies.base", "tasks.judging.judge"),
    *("models.engine.local", "models.endpoint.server", "models.training.sami", "models.embedders"),
    *("models.planted.oracle", "models.planted.pretrain", "models.house_style.oracle"),
)
"""Modules and packages that do not count just because a module imports them. Those of the first two
lines keep and show results, find and check a model's files, and name what else a result depends on:
they change no result. Settings choose the others: a stage names them where it uses them
(`Slot.uses`), and those that a `registry` lists. Of a registry only the functions count."""
TEXTS = ("Rubric", "Templates", "ConstitutionWording")
"""Classes whose module-level objects are texts: a stage notes the digest of those it uses."""


def code_versions(*modules: str) -> dict[str, str]:
    """Module → sha256 of its syntax tree: of `modules`, and of the project's that they import.

    Raises:
        UserError: Python would run, or has run, another file of the same name instead.
    """
    seen: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += _read(name).imports
    for name in seen:
        _check_is_ours(name)
    return {name: _read(name).tree for name in sorted(seen)}


def code_version(*modules: str) -> str:
    """One sha256 over `code_versions`.

    Raises:
        UserError: as `code_versions`.
    """
    return text_sha256(json.dumps(code_versions(*modules)))


@cache
def _source(module: str) -> Path | None:
    """The file of one of the project's modules; nothing is imported (torch takes seconds).

    A user's own stage is where it was loaded from.
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
    """Refuse a version of code that is not the code that runs: `tasks` is a common folder name.

    A module that is not loaded yet is searched for as its import will do.
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


class _Module(NamedTuple):
    tree: str
    """sha256 of the syntax tree without docstrings and texts (`TEXTS`)."""
    imports: frozenset[str]
    """The modules that count because this one imports them, also inside functions."""


@cache
def _read(module: str) -> _Module:
    """A file is parsed once for each user: together, a stage's files take more than a second."""
    source = _source(module)
    if source is None:
        return _Module("", frozenset())
    content, registry = source.read_bytes(), module.endswith(".registry")
    facts = (content, Path(__file__).read_bytes(), f"{sys.version} {registry}".encode())
    key = bytes_sha256(b"\0".join(facts))
    known = recall(user_cache() / "code", key)
    tree, *imports = known.split() or _parsed(content, registry)
    if not known:
        remember(user_cache() / "code", key, " ".join([tree, *imports]))
    return _Module(tree, frozenset(() if registry else filter(_counts, imports)))


def _parsed(content: bytes, registry: bool) -> list[str]:
    """sha256 (hex) of a file's syntax tree, and all that it imports."""
    tree = ast.parse(content)
    if registry:  # its list may grow
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        tree = ast.Module(list(functions), [])
    tree.body = [node for node in tree.body if not _is_noted(node)]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(body := getattr(node, "body", None), list):
            node.body = [n for n in body if not _is_text(n)]  # type: ignore[attr-defined]
    return [text_sha256(ast.dump(tree)), *sorted(found)]


def _counts(module: str) -> bool:
    """Whether an imported module is code of the project that changes what is computed."""
    if not _is_of_project(module):
        return False
    apart = any(module == name or module.startswith(f"{name}.") for name in APART)
    return not apart and _source(module) is not None


def _is_noted(node: ast.stmt) -> bool:
    call = node.value if isinstance(node, ast.Assign) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in TEXTS


def _is_text(node: ast.stmt) -> bool:
    """A docstring, of a module, class, function or attribute."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
