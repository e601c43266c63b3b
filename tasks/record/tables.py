"""Tables on disk: Parquet in small row groups that are written and read one at a time.

A table is a file, or, where it is larger than `FILE_BYTES`, a folder of such files; pandas,
DuckDB and others read both by the table's path. What lies where depends on the rows alone, never on
the pieces in which they were written. Arrow counts a column's text in a row group with 32 bits: a
nested one past 2³¹ bytes is written without an error and never read again.
"""

from __future__ import annotations

import io
import itertools
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.files import remove, written
from tasks.rows import from_table, schema, to_table

Row = TypeVar("Row")
Other = TypeVar("Other")

GROUP_BYTES = 4 << 20
"""Size of a row group by `row_bytes`; a row that is larger has one to itself."""
FILE_BYTES = 128 << 20
"""Size of a file's rows; a row group that is larger has one to itself."""
COMPRESSION = "zstd"
"""Of texts it takes half the time of Parquet's default to write and to read, and half the disk."""
BATCH = 16
"""Rows that are made into Arrow's columns together: their text has to stay below 2³¹ bytes."""


# Writing -------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Iterable[Any], row_type: type) -> None:
    """Write a table whole or not at all; the same rows give the same bytes."""
    write_tables(path, _tables(rows, row_type), row_type)


def write_tables(path: Path, tables: Iterable[pa.Table], row_type: type) -> None:
    """As `write_rows`, of Arrow tables whose rows follow each other."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(scratch)
    scratch.mkdir()
    try:
        with ExitStack() as last:

            def following(number: int) -> IO[bytes]:
                last.close()
                return last.enter_context(written(scratch / f"{number:05}.parquet"))

            _write(following, tables, row_type, FILE_BYTES)
        files = list(scratch.iterdir())
        if len(files) > 1 or path.is_dir():
            remove(path)
        (files[0] if len(files) == 1 else scratch).replace(path)
    finally:
        remove(scratch)


def rows_as_bytes(rows: Iterable[Any], row_type: type) -> bytes:
    """The bytes of a table in one file."""
    sink = io.BytesIO()
    _write(lambda _: sink, _tables(rows, row_type), row_type, file_bytes=None)
    return sink.getvalue()


def _tables(rows: Iterable[Any], row_type: type) -> Iterator[pa.Table]:
    left = iter(rows)
    while batch := list(itertools.islice(left, BATCH)):
        yield to_table(batch, row_type)


def _write(
    following: Callable[[int], IO[bytes]],
    tables: Iterable[pa.Table],
    row_type: type,
    file_bytes: int | None,
) -> None:
    """Write row groups into files; at least one group, so that no rows have their columns.

    Args:
        following: the number of a file → where to write it; the file before is complete then.
    """
    form, number, size = schema(row_type), 0, 0
    writer = pq.ParquetWriter(following(0), form, compression=COMPRESSION)
    try:
        for group, own in _groups(tables, form):
            if file_bytes is not None and size and size + own > file_bytes:
                writer.close()
                number, size = number + 1, 0
                writer = pq.ParquetWriter(following(number), form, compression=COMPRESSION)
            writer.write_table(group)
            size += own
    finally:
        writer.close()


def _groups(tables: Iterable[pa.Table], form: pa.Schema) -> Iterator[tuple[pa.Table, int]]:
    """Consecutive rows, and their size; at least one group."""
    pieces, size = list[pa.Table](), 0

    def group() -> tuple[pa.Table, int]:  # in one chunk: where chunks end shows in the bytes
        return pa.concat_tables(pieces or [form.empty_table()]).combine_chunks(), size

    for table in tables:
        ends, start = np.cumsum(row_bytes(table)), 0
        while start < table.num_rows:
            before = int(ends[start - 1]) if start else 0
            fit = int(np.searchsorted(ends, before + GROUP_BYTES - size, side="right")) - start
            if pieces and fit <= 0:
                yield group()
                pieces, size = [], 0
                continue
            taken = max(fit, 1)
            pieces.append(table.slice(start, taken))
            start += taken
            size += int(ends[start - 1]) - before
    yield group()


def row_bytes(table: pa.Table) -> np.ndarray:
    """Size of each row: bytes of its texts in UTF-8, and eight a number; (rows,) int64."""
    total = np.zeros(table.num_rows, dtype=np.int64)
    for column in table.columns:
        total += _sizes(column.combine_chunks())
    return total


def _sizes(array: pa.Array) -> np.ndarray:
    import pyarrow.compute as pc  # what only reads the record does without

    if pa.types.is_string(array.type):
        return np.asarray(pc.fill_null(pc.binary_length(array), 0), dtype=np.int64)
    if pa.types.is_list(array.type):
        items = np.concatenate([[0], np.cumsum(_sizes(array.flatten()))])
        ends = np.cumsum(np.asarray(pc.list_value_length(array), dtype=np.int64))
        return np.asarray(np.diff(items[ends], prepend=0), dtype=np.int64)
    if pa.types.is_struct(array.type):
        return np.asarray(sum(map(_sizes, array.flatten())), dtype=np.int64)
    return np.full(len(array), 8, dtype=np.int64)


# Reading -------------------------------------------------------------------------------------


class _Group(NamedTuple):
    """A row group, and how many rows come before it."""

    file: Path
    number: int
    first: int


class StoredRows(Sequence[Row]):
    """The rows of a table on disk, read each time they are asked for, a row group at a time.

    A slice reads nothing either. Columns that the type lacks are not read.

    Args:
        span: the first row and the one after the last, in the table.
    """

    def __init__(
        self, row_type: type[Row], groups: Sequence[_Group], span: tuple[int, int]
    ) -> None:
        self._row_type, self._groups, self._span = row_type, groups, span

    @classmethod
    def at(cls, path: Path, row_type: type[Row]) -> StoredRows[Row]:
        """The rows of a table.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        groups, rows = [], 0
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            footer = pq.read_metadata(file)
            for number in range(footer.num_row_groups):
                groups.append(_Group(file, number, rows))
                rows += footer.row_group(number).num_rows
        return cls(row_type, groups, (0, rows))

    def __len__(self) -> int:
        return self._span[1] - self._span[0]

    def __iter__(self) -> Iterator[Row]:
        for table in self.tables():
            yield from from_table(table, self._row_type)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> StoredRows[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | StoredRows[Row]:
        if isinstance(index, int):
            place = range(len(self))[index]
            (found,) = self[place : place + 1]
            return found
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError("rows on disk are read in their order")
        first, end = self._span[0] + start, self._span[0] + max(start, stop)
        firsts = [group.first for group in self._groups]
        own = self._groups[max(bisect_right(firsts, first) - 1, 0) : bisect_right(firsts, end - 1)]
        return StoredRows(self._row_type, own, (first, end))

    def tables(self) -> Iterator[pa.Table]:
        """The rows as Arrow tables, one for each row group."""
        first, end = self._span
        for file, groups in itertools.groupby(self._groups, lambda group: group.file):
            with pq.ParquetFile(file) as source:
                columns = _columns_of(source, schema(self._row_type))
                for group in groups:
                    table = source.read_row_group(group.number, columns=columns)
                    start = max(first - group.first, 0)
                    part = table.slice(start, end - group.first - start)
                    if part.num_rows:
                        yield part


class Beside(Sequence[tuple[Row, Other]]):
    """Two tables of as many rows, side by side; whoever reads them holds their keys together."""

    def __init__(self, left: Sequence[Row], right: Sequence[Other]) -> None:
        if len(left) != len(right):
            raise ValueError(f"{len(left):,} rows beside {len(right):,}")
        self._left, self._right = left, right

    def __len__(self) -> int:
        return len(self._left)

    def __iter__(self) -> Iterator[tuple[Row, Other]]:
        return zip(self._left, self._right, strict=True)

    @overload
    def __getitem__(self, index: int) -> tuple[Row, Other]: ...

    @overload
    def __getitem__(self, index: slice) -> Beside[Row, Other]: ...

    def __getitem__(self, index: int | slice) -> tuple[Row, Other] | Beside[Row, Other]:
        if isinstance(index, int):
            return self._left[index], self._right[index]
        return Beside(self._left[index], self._right[index])


def read_bytes(content: bytes) -> Iterator[pa.Table]:
    """The Arrow tables of what `rows_as_bytes` returned."""
    with pq.ParquetFile(pa.BufferReader(content)) as file:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number)


_LIST = re.compile(r"\.list\.(element|item)")
"""What Parquet puts between a list's name and that of a field of its items."""


def _columns_of(file: pq.ParquetFile, form: pa.Schema) -> list[str]:
    """The file's columns that a schema has, nested ones too."""
    paths = [file.schema.column(n).path for n in range(len(file.schema))]
    wanted = set(_leaves(form))
    return [path for path in paths if _LIST.sub("", path) in wanted]


def _leaves(fields: Iterable[pa.Field], prefix: str = "") -> Iterator[str]:
    """ "candidates.sample", for each column without fields of its own."""
    for field in fields:
        kind = field.type
        while pa.types.is_list(kind):
            kind = kind.value_type
        if pa.types.is_struct(kind):
            yield from _leaves(kind, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"
