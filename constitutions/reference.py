"""Reads SAMI's constitutions, which pair principles with antitheses, from all of their formats.

A constitution may come with the project, or be a YAML file, a JSON file as SAMI's reference code
writes it, or a folder of such JSON files. `tasks.sami.write` and the CLI call `load_pairs`.

The reference's file holds two constitutions as numbered texts. Its identifiers say which items are
the principle ("pos") and the antithesis ("neg") of which name:

    {"positive": "1. …\\n2. …", "negative": "1. …\\n2. …",
     "identifiers": {"positive": ["pos concise", …], "negative": ["neg concise", …]}}
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from constitutions.constitution import (
    Constitution,
    Principle,
    load,
    principle_key,
    repetitions,
)
from constitutions.errors import UserError, UserErrors
from constitutions.parse import parse_json, read_text

HERE = Path(__file__).parent
SIDES = ("positive", "negative")
SIGNS = {"pos": "text", "neg": "antithesis"}
"""The first word of an identifier → the field of `Principle` that its item is."""


@dataclass(frozen=True, slots=True)
class _Item:
    """One item of a reference file: a principle's text or antithesis, and where it stands."""

    name: str
    field: str
    text: str
    where: str


def shipped() -> dict[str, Path]:
    """The constitutions that come with the project, by name."""
    return {path.stem: path for path in sorted(HERE.glob("*.yaml"))}


def load_pairs(source: str | os.PathLike[str]) -> Constitution:
    """The principles of a source, each with its antithesis where the source words one.

    Args:
        source: the name of a shipped constitution, a YAML file, a JSON file of the reference, or a
            folder of those, whose items are merged by identifier.

    Raises:
        UserError: a file is missing or malformed, files contradict one another, or there is no
            principle; all such mistakes at once, each with its file and field.
    """
    files = files_of(source)
    is_reference = files[0].suffix == ".json"
    constitution = _merged(files, str(source)) if is_reference else load(files[0])
    if not constitution.principles:
        raise UserError("there is no principle", where=str(source), expected="one or more")
    return constitution


def files_of(source: str | os.PathLike[str]) -> list[Path]:
    """The files of a source, in the order in which they are read.

    Raises:
        UserError: there are none.
    """
    name, path = str(source), Path(source).expanduser()
    if name in shipped():
        return [shipped()[name]]
    if path.is_dir():
        if found := sorted(p for p in path.glob("*.json") if p.is_file()):
            return found
        raise UserError("there is no JSON file in it", where=f"folder {path}", expected=EXPECTED)
    if not path.exists():
        known = ", ".join(shipped())
        raise UserError(
            "there is no such constitution", where=name, expected=f"one of {known}, or {EXPECTED}"
        )
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise UserError("neither YAML nor JSON, by its name", where=name, expected=EXPECTED)
    return [path]


EXPECTED = "a .yaml file, a .json file of SAMI's reference code, or a folder of those"


def _merged(files: list[Path], source: str) -> Constitution:
    """The constitution in the reference's files; raises UserErrors with all of their mistakes."""
    problems: list[UserError] = []
    found: dict[tuple[str, str], _Item] = {}
    for item in (item for path in files for item in _items(path, problems)):
        first = found.setdefault((item.name, item.field), item)
        if principle_key(first.text) != principle_key(item.text):
            problems.append(
                UserError(
                    f"the {item.field} of '{item.name}' differs from that in {first.where}",
                    where=item.where,
                    expected=f"“{first.text}”",
                    fix="give one of them another identifier",
                )
            )
    for (name, field), item in found.items():
        if field == "antithesis" and (name, "text") not in found:
            said = f"the antithesis of '{name}' has no principle"
            expected = f"an item with the identifier 'pos {name}' somewhere"
            problems.append(UserError(said, where=item.where, expected=expected))
    if problems:
        raise UserErrors(problems)
    principles = [
        Principle(
            id=name,
            text=item.text,
            antithesis=found[name, "antithesis"].text if (name, "antithesis") in found else "",
        )
        for (name, field), item in found.items()
        if field == "text"
    ]
    if repeated := list(repetitions([p.model_dump() for p in principles])):
        places = [f"{source}, '{principles[r.index].id}', {r.field}" for r in repeated]
        found_twice = zip(repeated, places, strict=True)
        raise UserErrors([UserError(r.what, where=where) for r, where in found_twice])
    return Constitution(principles=tuple(principles))


def _items(path: Path, problems: list[UserError]) -> list[_Item]:
    """A file's items; its mistakes are added to `problems`."""
    try:
        data = _parsed(path)
    except UserError as error:
        problems.append(error)
        return []
    items: list[_Item] = []
    for side in SIDES:
        text, identifiers = data[side], data["identifiers"]
        names: Any = identifiers.get(side) if isinstance(identifiers, dict) else None
        if wrong := [*_wrong_text(text, path, side), *_wrong_names(names, path, side)]:
            problems += wrong
            continue
        numbered = _numbered(text)
        if len(numbered) != len(names):
            said = f"there are {len(numbered)} numbered items and {len(names)} identifiers"
            where, expected = f"{path}, field '{side}'", "an identifier for each item"
            problems.append(UserError(said, where=where, expected=expected))
            continue
        for identifier, (_, item) in zip(names, numbered, strict=True):
            sign, name = identifier.split(maxsplit=1)
            items.append(_Item(name, SIGNS[sign], item, f"{path}, '{side}'"))
    return items


def _parsed(path: Path) -> dict[str, Any]:
    data = parse_json(read_text(path, expected="a JSON file"), str(path))
    fields = {*SIDES, "identifiers"}
    if not isinstance(data, dict) or set(data) != fields:
        given = f"the fields {', '.join(data) or 'none'}" if isinstance(data, dict) else "no object"
        raise UserError(
            f"this is no constitution of SAMI's reference: it has {given}",
            where=str(path),
            expected="an object with the fields positive, negative and identifiers",
        )
    return data


def _wrong_text(text: Any, path: Path, side: str) -> Iterator[UserError]:
    where = f"{path}, field '{side}'"
    if not isinstance(text, str) or not text.strip():
        yield UserError("this is not a text", where=where, expected=NUMBERED)
        return
    numbered = _numbered(text)
    if [number for number, _ in numbered] != list(range(1, len(numbered) + 1)) or not numbered:
        yield UserError("its items are not numbered from 1 on", where=where, expected=NUMBERED)
    for number, item in numbered:
        if not item:
            yield UserError(f"item {number} is empty", where=where, expected="a principle")
        if not item.isascii() and _is_torn(item):
            said = f"item {number} holds half a character (a lone surrogate)"
            yield UserError(said, where=where, expected="text that can be written as UTF-8")


NUMBERED = "principles as one text, each on a line of its own that starts with '1. ', '2. ', …"


def _wrong_names(names: Any, path: Path, side: str) -> Iterator[UserError]:
    where = f"{path}, field 'identifiers.{side}'"
    if not isinstance(names, list) or not names:
        yield UserError("this is not a list", where=where, expected="an identifier for each item")
        return
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"(pos|neg)\s+\S.*", name.strip()):
            expected = "'pos NAME' for a principle, 'neg NAME' for an antithesis"
            yield UserError(f"{name!r} is no identifier", where=where, expected=expected)
        elif _is_torn(name):
            yield UserError(f"{name!r} holds half a character", where=where, expected="UTF-8")
        elif name in seen:
            yield UserError(f"'{name}' is there twice", where=where, expected="each name once")
        else:
            seen.add(name)


def _numbered(text: str) -> list[tuple[int, str]]:
    """The items of a numbered text, with their numbers; text before the first item is item 0."""
    before, *rest = re.split(r"^\s*(\d{1,4})\.(?=\s|$)", text, flags=re.MULTILINE)
    items = [(0, before)] if before.strip() else []
    items += [(int(number), item) for number, item in zip(rest[::2], rest[1::2], strict=True)]
    return [(number, " ".join(item.split())) for number, item in items]


def _is_torn(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)
