"""Records from the user's files and data sets, row by row; a row that cannot be read says why.

Read by `tasks.corpus`. A record is what a row holds, by column; what the columns mean is the
business of `tasks.corpus_formats`.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from constitutions.errors import UserError

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
        row_id: the row's prompt_id, where it has come so far.
    """

    def __init__(
        self, reason: str, detail: str, *, field: str = "", expected: str = "", row_id: str = ""
    ) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.field, self.expected = reason, detail, field, expected
        self.row_id = row_id


def wrong_type(value: object, field: str, expected: str) -> RowError:
    """The error of a value that is of no such type."""
    kind = "null" if value is None else type(value).__name__
    return RowError("wrong type", f"the value is of type {kind}", field=field, expected=expected)


def file_records(path: Path) -> Records:
    """The rows of a JSONL, JSON, CSV or Parquet file.

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
        UserError: there is no such file, or it is of another kind.
    """
    path = path.expanduser()
    if not path.is_file():
        what = "this is a folder" if path.is_dir() else "there is no such file"
        raise UserError(what, where=str(path), expected="a file with prompts and gold responses")
    if _kind(path) not in _READERS:
        raise UserError(
            f"files of type {path.suffix or 'none'} cannot be read",
            where=str(path),
            expected=".jsonl, .json, .csv (each also .gz) or .parquet",
        )
    return path


def _kind(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[2].lower()


def _open(path: Path, newline: str = "\n") -> IO[str]:
    """Broken bytes become lone surrogates, which the field that holds them reports."""
    opener: Callable[..., IO[str]] = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _jsonl(path: Path) -> Records:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parsed(line)


def _parsed(line: str) -> Record | RowError:
    try:
        return _object(json.loads(line))
    except (ValueError, RecursionError) as error:
        return RowError(
            "broken JSON", f"this is not JSON: {error}", expected="one JSON object a line"
        )


def _object(value: object) -> Record | RowError:
    return value if isinstance(value, dict) else wrong_type(value, "", "a JSON object")


def _json(path: Path) -> Records:
    """A list of objects; or JSON Lines under the wrong name, as hubs have it."""
    with _open(path) as file:
        if not file.read(4096).lstrip().startswith("["):
            yield from _jsonl(path)
            return
        file.seek(0)
        try:
            values = json.load(file)
        except (ValueError, RecursionError) as error:
            raise UserError(f"this is not JSON: {error}", where=str(path)) from None
    for number, value in enumerate(values, start=1):
        yield number, _object(value)


def _csv(path: Path) -> Records:
    csv.field_size_limit(sys.maxsize)  # A field that is too long is a bad row, not the end.
    with _open(path, newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for number, record in enumerate(reader, start=1):
                yield number, _whole(record, len(reader.fieldnames or ()))
        except csv.Error as error:
            where = f"{path}, line {reader.line_num}"
            raise UserError(f"this is not CSV: {error}", where=where) from None


def _whole(record: Record, columns: int) -> Record | RowError:
    """The record, unless it has more or fewer fields than the header."""
    extra = len(record.get(None, ()))  # type: ignore[call-overload]
    missing = sum(value is None for value in record.values())
    if extra or missing:
        found = columns + extra - missing
        return RowError(
            "broken CSV", f"the row has {found} fields", expected=f"{columns}, as the header has"
        )
    return record


def _parquet(path: Path) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = itertools.count(1)
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for i in range(batch.num_rows):
                    yield next(number), _row(batch.slice(i, 1))
    except pa.ArrowException as error:
        raise UserError(f"this is not Parquet: {error}", where=str(path)) from None


def _row(batch: Any) -> Record | RowError:
    """The one row of a batch."""
    row = {}
    for name in batch.schema.names:
        try:
            row[name] = batch.column(name)[0].as_py()
        except UnicodeDecodeError as error:
            what = f"byte 0x{error.object[error.start]:02x} at byte {error.start + 1}"
            return RowError("broken text", f"{what} is not valid UTF-8", field=name)
    return row


_READERS: dict[str, Callable[[Path], Records]] = {
    "jsonl": _jsonl,
    "ndjson": _jsonl,
    "json": _json,
    "csv": _csv,
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
