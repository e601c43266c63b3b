"""Records from the user's files and data sets, row by row; a row that cannot be read says why.

Read by `tasks.corpus.prompts`. A record is what a row holds, by column; what the columns mean is
the business of `tasks.corpus.formats`. JSON has a reader of its own, `tasks.corpus.json_text`.
"""

from __future__ import annotations

import csv
import itertools
import re
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from constitutions.errors import UserError
from tasks.corpus.json_text import json_rows
from tasks.corpus.rows import Record, Records, RowError, repeated
from tasks.corpus.text import EXPANSION, LONGEST_ROW, SMALL, Lines, open_text

EXPECTED = "a file with prompts and gold responses"


def file_records(path: Path) -> Records:
    """The rows of a JSON Lines, JSON, CSV or Parquet file.

    Raises:
        UserError: the file as a whole cannot be read.
    """
    try:
        path = checked_file(path)
        yield from _READERS[_kind(path)](path)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"the file cannot be read: {error}", where=str(path)) from error


def checked_file(path: Path) -> Path:
    """The path of a file of a kind that can be read.

    Raises:
        UserError: there is no such file, its kind cannot be read, or it may never end (a named
            pipe, a device).
    """
    try:
        path = path.expanduser()
        mode = path.stat().st_mode
    except (OSError, ValueError, RuntimeError) as error:  # also "~nobody", NUL, a long name
        why = getattr(error, "strerror", None) or str(error)
        absent = isinstance(error, (FileNotFoundError, NotADirectoryError))
        what = "there is no such file" if absent else f"the file cannot be read: {why}"
        raise UserError(what, where=str(path), expected=EXPECTED) from None
    if not stat.S_ISREG(mode):
        what = "this is a folder" if stat.S_ISDIR(mode) else "this is a pipe or a device"
        raise UserError(what, where=str(path), expected=EXPECTED)
    if _kind(path) not in _READERS:
        raise UserError(
            f"files of type {path.suffix or 'none'} cannot be read",
            where=str(path),
            expected=".jsonl, .json, .csv, .tsv (each also .gz) or .parquet",
        )
    return path


def _kind(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[2].lower()


# CSV ------------------------------------------------------------------------------------------


def _csv(path: Path) -> Records:
    """Fields between commas; or semicolons, tabs or bars, where the header has no comma."""
    csv.field_size_limit(sys.maxsize)  # a field that is too long is a bad row, not the end
    with open_text(path, newline="") as file:
        lines = _RowLines(Lines(file, path))
        first = next(lines, "")
        declared = re.fullmatch(r"sep=(.)\s*", first)  # as Excel writes it
        first = next(lines, "") if declared else first
        delimiter = declared[1] if declared else _delimiter(first)
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        try:
            header = _header(next(reader, []), path)
            rows = (fields for fields in reader if fields)
            for number, fields in enumerate(rows, start=1):
                yield number, _record(header, fields)
                lines.size = 0
        except csv.Error as error:
            where = f"{path}, line {reader.line_num}"
            raise UserError(f"this is not CSV: {error}", where=where) from None


class _RowLines(Iterator[str]):
    """Lines for `csv`, of which a quoted field may take several. `size`: characters of this row."""

    def __init__(self, lines: Lines) -> None:
        self._lines, self.size = lines, 0

    def __next__(self) -> str:
        line = self._lines.read(blank=True)
        if not line:
            raise StopIteration
        self.size += len(line)
        if self.size > LONGEST_ROW:
            raise UserError(
                f"the row has more than {LONGEST_ROW:,} characters",
                where=self._lines.where,
                expected="short rows (is a quotation mark missing further up?)",
            )
        return line


def _delimiter(header: str) -> str:
    for delimiter in ",;\t|":
        if len(next(csv.reader([header], delimiter=delimiter), [])) > 1:
            return delimiter
    return ","


def _header(names: list[str], path: Path) -> list[str]:
    twice = repeated(filter(None, names))
    if twice is not None:
        places = [i for i, name in enumerate(names, start=1) if name == twice]
        raise UserError(
            f"the column {twice!r} occurs twice (columns {places[0]} and {places[1]})",
            where=f"{path}, header",
            expected="each name once",
        )
    return names


def _record(header: list[str], fields: list[str]) -> Record | RowError:
    """The record, unless it has more or fewer fields than the header."""
    if len(fields) != len(header):
        return RowError(
            "broken CSV",
            f"the row has {len(fields)} fields",
            expected=f"{len(header)}, as the header has",
        )
    return dict(zip(header, fields, strict=True))


# Parquet --------------------------------------------------------------------------------------


def _parquet(path: Path) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = itertools.count(1)
    try:
        with pq.ParquetFile(path) as file:
            shared = _shared_texts(file, path)
        with pq.ParquetFile(path, read_dictionary=shared) as file:
            for batch in file.iter_batches(batch_size=256):
                for i in range(batch.num_rows):
                    yield next(number), _row(batch, i)
    except pa.ArrowException as error:
        raise UserError(f"this is not Parquet: {error}", where=str(path)) from None
    except MemoryError:
        raise UserError("the file needs more memory than there is", where=str(path)) from None


def _shared_texts(file: Any, path: Path) -> list[str]:
    """The columns whose texts are stored once and referred to: read so, a long text that a million
    rows refer to stays one text.

    Raises:
        UserError: a column occurs twice, or the file would expand too far.
    """
    twice = repeated(file.schema_arrow.names)
    if twice is not None:
        what = f"the column {twice!r} occurs twice"
        raise UserError(what, where=str(path), expected="each name once")
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    most = max(SMALL, EXPANSION * path.stat().st_size)
    if sum(max(group.total_byte_size, 0) for group in groups) > most:
        raise UserError(
            f"the file expands to more than {most >> 20:,} MiB",
            where=str(path),
            expected=f"at most {EXPANSION} times its size",
        )
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    texts = {str(f.name) for f in file.schema_arrow if str(f.type) in ("string", "large_string")}
    return sorted({c.path_in_schema for c in columns if c.has_dictionary_page} & texts)


def _row(batch: Any, i: int) -> Record | RowError:
    import pyarrow as pa

    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        cell = column[i].value if isinstance(column, pa.DictionaryArray) else column[i]
        try:
            text = cell.as_buffer() if isinstance(cell, pa.BinaryScalar) else None
            if text is not None and text.size > LONGEST_ROW:
                what = f"the text has more than {LONGEST_ROW:,} bytes"
                return RowError("too long", what, field=name, expected="a shorter text")
            row[name] = cell.as_py()
        except UnicodeDecodeError as error:
            what = f"byte 0x{error.object[error.start]:02x} at byte {error.start + 1}"
            return RowError("broken text", f"{what} is not valid UTF-8", field=name)
        except (ValueError, OverflowError) as error:
            return RowError("wrong type", f"the value cannot be read: {error}", field=name)
    return row


_READERS: dict[str, Callable[[Path], Records]] = {
    "jsonl": json_rows,
    "ndjson": json_rows,
    "json": json_rows,
    "csv": _csv,
    "tsv": _csv,
    "parquet": _parquet,
}


def hub_data(name: str, subset: str | None, split: str, revision: str | None) -> Any:
    """The data set that `datasets` finds by name: on the hub, on disk or in its cache.

    Raises:
        UserError: there is none, or not this subset, split or revision of it.
    """
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the data set cannot be loaded: {reason}",
            where=name,
            expected="a data set's name, with its subset and split, on the hub or in the cache",
        ) from error
