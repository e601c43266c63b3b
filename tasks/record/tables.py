"""Rows on disk: Parquet in row groups that can be read back, whatever the rows hold.

Arrow counts a column's text in a row group with 32 bits: a nested one past 2³¹ bytes is written
without an error and never read again. So no row group holds more text than `GROUP_BYTES`, and
tables are written and read one row group at a time.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from models.files import written
from tasks.rows import from_table, schema, to_table

Row = TypeVar("Row")

GROUP_BYTES = 64 << 20
"""Text of a row group in UTF-8; a row that is longer has one to itself."""
GROUP_ROWS = 1 << 18


def write_rows(
    path: Path, rows: Iterable[Any], row_type: type, group_bytes: int = GROUP_BYTES
) -> None:
    """Write a Parquet file whole or not at all; the same rows give the same bytes."""
    with written(path) as sink:
        _write_groups(sink, rows, row_type, group_bytes)


def rows_as_bytes(rows: Iterable[Any], row_type: type) -> bytes:
    """The bytes of such a file."""
    sink = io.BytesIO()
    _write_groups(sink, rows, row_type, GROUP_BYTES)
    return sink.getvalue()


def _write_groups(sink: IO[bytes], rows: Iterable[Any], row_type: type, group_bytes: int) -> None:
    with pq.ParquetWriter(sink, schema(row_type)) as writer:
        for group in _groups(rows, group_bytes):
            writer.write_table(to_table(group, row_type))


def read_rows(source: Path | pa.BufferReader, row_type: type[Row]) -> list[Row]:
    """The rows of a Parquet file; raises TypeError when columns are missing or unknown."""
    with pq.ParquetFile(source) as file:
        groups = range(file.num_row_groups)
        return [row for n in groups for row in from_table(file.read_row_group(n), row_type)]


def _groups(rows: Iterable[Any], group_bytes: int) -> Iterator[list[Any]]:
    """Consecutive rows; at least one group, so that a table without rows has its columns."""
    group: list[Any] = []
    size = 0
    for row in rows:
        own = text_bytes(row)
        if group and (size + own > group_bytes or len(group) == GROUP_ROWS):
            yield group
            group, size = [], 0
        group.append(row)
        size += own
    yield group


def text_bytes(value: Any) -> int:
    """Bytes of all texts in a row, nested ones included, in UTF-8."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))
    if isinstance(value, dict):
        return sum(map(text_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(text_bytes, value))
    if is_dataclass(value):
        return sum(text_bytes(getattr(value, field.name)) for field in fields(value))
    return 0
