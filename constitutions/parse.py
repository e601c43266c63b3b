"""Reads YAML and JSON that a person or another program wrote, within bounds.

Every settings file, `--set` value, constitution and response file is read here. Whatever it holds,
the result is its value or one `UserError` that names the place: no other exception, no endless wait
(for a FIFO or a device), and no more memory than the bounds allow (for aliases that expand).
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from constitutions.errors import UserError
from constitutions.untrusted import hide_passwords

DEEPEST = 64
"""Most lists and mappings within one another."""
MOST_KEYS = 1_000
"""Most keys of one YAML mapping."""
LARGEST_INT = 2**63 - 1
"""The largest absolute value of a whole number."""
TYPES = {
    **{"timestamp": "a date", "binary": "binary data", "set": "a set"},
    **{"omap": "a list of pairs", "pairs": "a list of pairs"},
}
"""YAML's types that are refused, in words."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is read at most."""

    size: int
    """Bytes of a file."""
    nodes: int
    """Values, those within values included, after every alias is written out."""


SMALL = Bounds(size=4 << 20, nodes=100_000)
"""The bounds of settings."""
LARGE = Bounds(size=64 << 20, nodes=2_000_000)
"""The bounds of constitutions (50,000 principles with their wordings) and response files."""


# Files ------------------------------------------------------------------------------------------


def read_text(
    path: str | os.PathLike[str], bounds: Bounds = LARGE, expected: str = "a text file"
) -> str:
    """The text of a regular file, without a byte order mark.

    Raises:
        UserError: the file does not exist, is not a regular one (a directory, a FIFO, a device), is
            larger than the bounds, or is not UTF-8.
    """
    where = str(path)
    try:
        # without O_NONBLOCK, opening a FIFO would wait for its writer
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UserError("there is no such file", where=where, expected=expected) from None
    except (OSError, ValueError) as error:  # ValueError: the name has NUL or half a character
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"it cannot be read: {why}", where=where, expected=expected) from None
    try:
        if problem := _not_regular(os.fstat(handle).st_mode):
            raise UserError(problem, where=where, expected=expected)
        with open(handle, "rb", closefd=False) as file:
            raw = file.read(bounds.size + 1)
    finally:
        os.close(handle)
    if len(raw) > bounds.size:
        most = f"at most {bounds.size >> 20} MiB"
        raise UserError("the file is too large", where=where, expected=most)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = f"{path}, byte {error.start}"
        raise UserError("the text is not UTF-8", where=at, expected="UTF-8") from None


def _not_regular(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "this is a directory"
    return "" if stat.S_ISREG(mode) else "this is no regular file"


def whole(text: str, where: str) -> str:
    """The same text, from the command line or a form, where it is UTF-8 without NUL.

    Raises:
        UserError: it holds NUL, or half a character (a lone surrogate: bytes that are not UTF-8).
    """
    torn = next((n for n, c in enumerate(text) if c == "\0" or "\ud800" <= c <= "\udfff"), None)
    if torn is not None:
        said = f"place {torn + 1} is half a character, or NUL"
        raise UserError(said, where=where, expected="text that is UTF-8")
    return text


# YAML -------------------------------------------------------------------------------------------


def parse_yaml(text: str, where: str, bounds: Bounds = SMALL, *, fix: str = "") -> Any:
    """The value of a YAML document: None, bool, int, finite float, str, lists and dicts of those.

    Args:
        where: the name of the text in errors: a file, or "--set NAME".
        fix: the next step in errors about YAML's own syntax.

    Raises:
        UserError: the text is not YAML, exceeds the bounds or nests too deeply; a key is repeated
            or is a list or a mapping; a value has another type or is malformed (a 13th month,
            5,000 digits). The error names the line.
    """
    try:
        text.encode()  # libyaml reads UTF-8
        _check_events(text, bounds)
        root = yaml.compose(text, Loader=_Loader)
        _check_keys(root)
        return _Loader("").construct_document(root) if root else None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        said = error.problem or "this is not YAML"
        raise UserError(said, where=f"{where}{line}", fix=fix) from None
    except yaml.reader.ReaderError as error:
        said = f"YAML does not allow character {error.position + 1} (U+{_code(error):04X})"
        raise UserError(said, where=where, expected="text without control characters") from None
    except UnicodeEncodeError as error:
        said = f"half a character (a lone surrogate) at place {error.start}"
        raise UserError(said, where=where, expected="text that is UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"this is not YAML ({error})", where=where, fix=fix) from None


def yaml_tree(text: str) -> yaml.Node | None:
    """The tree of nodes, each with its line, of a document that `parse_yaml` has read."""
    return yaml.compose(text, Loader=_Loader)


def line_of(root: yaml.Node | None, location: Sequence[str | int]) -> int:
    """The line, from 1, of a location, or of its nearest ancestor in the document."""
    node = root
    for step in location:
        found = next((child for name, child in _children(node) if name == step), None)
        if found is None:
            break
        node = found
    return int(node.start_mark.line) + 1 if node else 1


def _children(node: yaml.Node | None) -> Iterator[tuple[str | int, yaml.Node]]:
    if isinstance(node, yaml.SequenceNode):
        yield from enumerate(node.value)
    elif isinstance(node, yaml.MappingNode):
        yield from ((key.value, value) for key, value in node.value)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A safe loader for plain values, whose errors have the line of the node.

    It refuses YAML's dates, sets and binaries: most are meant as text.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind in TYPES:
            raise _refused(f"this is {TYPES[kind]}; put it in quotes where it is a text", node)
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError):
            raise _refused(f"'{_short(node.value)}' is not of the type {kind}", node) from None
        if isinstance(value, float) and not math.isfinite(value):
            raise _refused(f"'{node.value}' is not finite", node)
        if isinstance(value, int) and abs(value) > LARGEST_INT:
            raise _refused("this number is too large", node)
        if isinstance(value, str) and "\0" in value:
            raise _refused("the text holds the character NUL", node)
        return value


def _check_events(text: str, bounds: Bounds) -> None:
    """Refuse a document that nests too deeply or expands too far, before it is built.

    The size of an anchored value is known at its end; an alias counts as many values as it has.
    """
    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []  # anchor, and the count when it began
    count = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_):
                raise _refused(f"'*{event.anchor}' is a part of itself", event)
            count += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.NodeEvent):
            count += 1
            if isinstance(event, yaml.ScalarEvent):
                count += len(event.value) >> 10  # an alias may repeat a long text, too
                sizes |= {event.anchor: 1 + (len(event.value) >> 10)} if event.anchor else {}
            else:
                open_.append((event.anchor, count))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor:
                sizes[anchor] = count - before + 1
        if len(open_) > DEEPEST:
            raise _refused(f"this nests deeper than {DEEPEST} levels", event)
        if count > bounds.nodes:
            raise _refused(f"this holds more than {bounds.nodes:,} values", event)


def _check_keys(root: yaml.Node | None) -> None:
    """Refuse repeated keys, of which YAML silently drops the first, and keys that are not words."""
    waiting, seen = [root] if root else [], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        keys = set[tuple[str, str]]()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused("a key is a list or a mapping, not a word", key)
            if (key.tag, key.value) in keys:
                raise _refused(f"the key '{_short(key.value)}' is given twice in one entry", key)
            keys.add((key.tag, key.value))
            waiting.append(value)
        if len(keys) > MOST_KEYS:
            raise _refused(f"this has {len(keys):,} keys, and may have {MOST_KEYS:,}", node)


def _refused(problem: str, at: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    mark: Any = at.start_mark
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _code(error: yaml.reader.ReaderError) -> int:
    return error.character if isinstance(error.character, int) else ord(str(error.character)[0])


def _short(value: Any) -> str:
    shown = hide_passwords(str(value)[:1_000])
    return shown if len(shown) <= 60 else f"{shown[:57]}…"


# JSON -------------------------------------------------------------------------------------------


def parse_json(text: str, where: str, *, expected: str = "") -> Any:
    """The value of a JSON text.

    It may hold half characters (lone surrogates): the caller refuses them, and can name the field.

    Raises:
        UserError: the text is not JSON, exceeds the bounds or nests too deeply; a key occurs twice
            in an object; a number is not finite, or too large for 64 bits.
    """
    if sum(map(text.count, "[{,")) > LARGE.nodes:  # before any of them is built
        most = f"this holds more than {LARGE.nodes:,} values"
        raise UserError(most, where=where, expected=expected)
    try:
        value = json.loads(
            text,
            object_pairs_hook=unique_keys,
            parse_constant=_finite,
            parse_float=_finite,
            parse_int=_whole,
        )
        if _deeper(value, DEEPEST):
            raise RecursionError(f"it nests deeper than {DEEPEST} levels")
    except (ValueError, RecursionError) as error:
        raise UserError(f"this is not JSON: {error}", where=where, expected=expected) from None
    except RepeatedKeyError as error:
        raise UserError(str(error), where=where, expected="keys that differ") from None
    return value


class RepeatedKeyError(Exception):
    """An object of a JSON text has a key twice; readers would silently drop the first value."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` of a `json.loads` that refuses repeated keys.

    Raises:
        RepeatedKeyError: a key occurs twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        names = Counter(name for name, _ in pairs)
        twice = next(name for name, times in names.items() if times > 1)
        raise RepeatedKeyError(f"the key {_short(twice)!r} occurs twice")
    return values


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{_short(digits)} is not a finite number")
    return value


def _whole(digits: str) -> int:
    value = int(digits) if len(digits) < 25 else LARGEST_INT + 1
    if abs(value) > LARGEST_INT:
        raise ValueError(f"the number {_short(digits)} is too large")
    return value


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects nest deeper; found without recursion, which Python limits."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, (list, dict))
            for inner in (outer if isinstance(outer, list) else outer.values())
            if isinstance(inner, (list, dict))
        ]
        if not layer:
            return False
    return True
