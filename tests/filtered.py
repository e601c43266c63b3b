"""The filter on rows in memory."""

from __future__ import annotations

from collections.abc import Iterable

from tasks.filter import FilterSettings, filter_row
from tasks.rows import Rejected, Scored, Trajectory


def filter_rows(
    rows: Iterable[Scored], settings: FilterSettings, key: str
) -> tuple[list[Trajectory], list[Rejected]]:
    """What is kept of all rows, and what is rejected."""
    found = [filter_row(row, settings, key) for row in rows]
    return [t for row in found for t in row.kept], [r for row in found for r in row.rejected]
