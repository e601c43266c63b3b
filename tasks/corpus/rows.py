"""Rows of the user's data: records, and what is wrong with a row that is not one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Record = Mapping[str, Any]
Records = Iterator[tuple[int, "Record | RowError"]]
"""Row numbers, from 1 (lines, in JSON Lines), each with its record or what is wrong with it."""


class RowError(Exception):
    """What is wrong with one row.

    Args:
        reason: a short class of problems, to count by ("duplicate").
        detail: this problem, as a clause without a full stop.
        field: the column, and the place in it.
        expected: what would have been right.
        row_id: the row's prompt_id, where it is known already.
    """

    def __init__(
        self, reason: str, detail: str, *, field: str = "", expected: str = "", row_id: str = ""
    ) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.field, self.expected = reason, detail, field, expected
        self.row_id = row_id


def wrong_type(value: object, field: str, expected: str) -> RowError:
    """The error of a value of another type than expected."""
    kind = "null" if value is None else type(value).__name__
    missing = " (NaN, which is a missing value)" if value != value else ""
    what = f"the value is of type {kind}{missing}"
    return RowError("wrong type", what, field=field, expected=expected)


def repeated(names: Iterable[str]) -> str | None:
    """The first name that occurs a second time."""
    seen = set[str]()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
