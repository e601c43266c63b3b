"""Rows from JSON in its usual forms: JSON Lines, a list, a list within an object.

Used by `tasks.corpus.files`. The content of a file decides how it is read, not its name; a list is
read row by row, however long it is.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from constitutions.errors import UserError
from tasks.corpus.rows import Record, Records, RowError, repeated, wrong_type
from tasks.corpus.text import LONGEST_ROW, Lines, open_text

WRAPPERS = ("data", "rows", "examples", "instances", "train")
"""Keys under which an object holds a list of rows."""
DEEPEST = 64
"""Lists and objects within one another, in a row of a list."""

_NEXT = re.compile(r"[^ \t\n\r]")
_TOKEN = re.compile(
    r'[ \t\n\r]*+("[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},:]|[^\s"\[\]{},:]++)', re.DOTALL
)
_WRAPPED = re.compile(rf'"(?:{"|".join(WRAPPERS)})"\s*:\s*\[\s*\{{')


def json_rows(path: Path) -> Records:
    """The rows of JSON Lines, or of a JSON document: a list of objects, an object with such a list
    under one of the keys WRAPPERS, or objects one after another, on as many lines as they like.

    Raises:
        UserError: the file as a whole cannot be read.
    """
    whole = _is_document(path)
    with open_text(path) as file:
        yield from _Document(file, path).rows() if whole else _lines(file, path)


def _is_document(path: Path) -> bool:
    """Whether the file is one JSON value, or several over several lines; else a value a line."""
    with open_text(path) as file:
        lines = Lines(file, path)
        first = lines.read().lstrip()
        if not first.startswith("{"):
            return first.startswith("[")
        if len(first) > LONGEST_ROW - 64:  # without its end: a long list on one line
            return _WRAPPED.search(first, 0, 4096) is not None
        second = lines.read().lstrip()
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return bool(second) and not second.startswith("{")
    return not second


def _lines(file: IO[str], path: Path) -> Records:
    lines = Lines(file, path)
    while line := lines.read():
        if len(line) <= LONGEST_ROW:
            yield lines.number, _parsed(line)
            continue
        if line[-1] != "\n":
            lines.skip()
        yield lines.number, _too_long()


def _too_long() -> RowError:
    what = f"the row has more than {LONGEST_ROW:,} characters"
    return RowError("too long", what, expected="one JSON object a line")


def _parsed(text: str) -> Record | RowError:
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        problem = "it is nested too deeply"
    except json.JSONDecodeError as error:
        problem = str(error)
    except ValueError:
        problem = "a number has too many digits"
    except RowError as error:
        return error
    else:
        return value if isinstance(value, dict) else wrong_type(value, "", "a JSON object")
    return RowError(
        "broken JSON", f"this is not JSON: {problem}", expected="one JSON object a line"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if (twice := repeated(name for name, _ in pairs)) is not None:
        raise RowError(
            "repeated key", "the key occurs twice", field=twice, expected="each key once"
        )
    return values


class _Document:
    """A JSON text that is read value by value, with only the current value in memory.

    Its methods raise UserError where the text is not JSON or a bound is exceeded.
    """

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file, self._path = file, path
        self._buffer, self._at = "", 0
        self._number = itertools.count(1)
        self._list = ""
        """The key whose list was read."""

    def rows(self) -> Records:
        while first := self._peek():
            if first == "[":
                yield from self._rows_of_list()
            elif first == "{":
                yield from self._rows_of_object()
            else:
                raise self._broken(f"{self._value()[:40]!r} stands after the last row")

    def _rows_of_list(self) -> Records:
        self._take("[")
        closed = self._peek() == "]" and bool(self._take("]"))
        while not closed:
            number = next(self._number)
            yield number, _parsed(self._value())
            closed = self._take(",]") == "]"

    def _rows_of_object(self) -> Records:
        members, size, found = list[str](), 0, False
        self._take("{")
        closed = self._peek() == "}" and bool(self._take("}"))
        while not closed:
            name = self._value()
            self._take(":")
            if name.strip('"') in WRAPPERS and self._begins_list_of_objects():
                if self._list:
                    raise UserError(
                        f"the file holds two lists of rows, {self._list} and {name}",
                        where=str(self._path),
                        expected="one list",
                        fix="write each into a file of its own",
                    )
                self._list, found = name, True
                yield from self._rows_of_list()
            else:
                members.append(f"{name}: {self._value()}")
                size += len(members[-1])
                if size > LONGEST_ROW:
                    raise self._long()
            closed = self._take(",}") == "}"
        if not found:
            record = _parsed(f"{{{', '.join(members)}}}")
            if isinstance(record, dict) and _holds_columns(record):
                raise UserError(
                    f"the file holds columns, not rows (an object of {', '.join(record)[:80]})",
                    where=str(self._path),
                    expected="a list of objects, or one object a line",
                    fix="with pandas: to_json(orient='records', lines=True)",
                )
            yield next(self._number), record

    def _begins_list_of_objects(self) -> bool:
        return [token for token, _ in itertools.islice(self._tokens(), 2)] == ["[", "{"]

    # Characters and values

    def _fill(self) -> bool:
        """Read more, and drop what was taken. It reads twice as much each time, so that a long
        value is not scanned too often."""
        more = self._file.read(max(1 << 16, len(self._buffer) - self._at))
        self._buffer, self._at = self._buffer[self._at :] + more, 0
        return bool(more)

    def _peek(self) -> str:
        """The next character that is no space, which it drops; "" at the end."""
        while (found := _NEXT.search(self._buffer, self._at)) is None:
            self._at = len(self._buffer)
            if not self._fill():
                return ""
        self._at = found.start()
        return found[0]

    def _take(self, wanted: str) -> str:
        found = self._peek()
        if not found or found not in wanted:
            listed = " or ".join(repr(c) for c in wanted)
            raise self._broken(
                f"{listed} is missing {f'before {found!r}' if found else 'at its end'}"
            )
        self._at += 1
        return found

    def _value(self) -> str:
        """The text of the next value, within bounds; its brackets match, the rest is unchecked."""
        self._peek()
        at, depth = 0, 0
        for token, end in self._tokens():
            if token in "[{":
                depth += 1
            elif token in "]}":
                depth -= 1
            at = end
            if depth > DEEPEST:
                raise self._broken(f"it nests deeper than {DEEPEST} levels")
            if depth < 0 or (depth == 0 and token in ",:"):
                raise self._broken(f"a value is missing before {token!r}")
            if depth == 0:
                break
        text = self._buffer[self._at : self._at + at]
        self._at += at
        return text

    def _tokens(self) -> Iterator[tuple[str, int]]:
        """Each token from here on, with where it ends, counted from here."""
        at = 0
        while True:
            if at > LONGEST_ROW:
                raise self._long()
            found = _TOKEN.match(self._buffer, self._at + at)
            cut = found is None or (found.end() == len(self._buffer) and found[1] not in "[]{},:")
            if cut and len(self._buffer) - self._at > LONGEST_ROW + 1:
                raise self._long()
            if cut and self._fill():
                continue
            if found is None:
                raise self._broken("it ends within a value")
            at = found.end() - self._at
            yield found[1], at

    def _broken(self, problem: str) -> UserError:
        return UserError(f"this is not JSON: {problem}", where=self._where)

    def _long(self) -> UserError:
        return UserError(
            f"a value has more than {LONGEST_ROW:,} characters",
            where=self._where,
            expected="a list of objects, or one object a line",
        )

    @property
    def _where(self) -> str:
        after = next(self._number) - 1
        return f"{self._path}, after row {after:,}" if after else str(self._path)


def _holds_columns(record: Record) -> bool:
    """Whether the values are whole columns, as pandas' `to_json` and `to_dict` write them."""
    values = list(record.values())
    if values and all(isinstance(value, dict) and "0" in value for value in values):
        return True
    lists = [value for value in values if isinstance(value, list)]
    plain = not any(isinstance(item, dict) for value in lists for item in value)
    return len(lists) == len(values) > 1 and plain
