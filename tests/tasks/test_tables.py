"""Tables: bounded row groups and files whatever the rows hold, and read one group at a time."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.record import tables
from tasks.record.tables import Beside, StoredRows, row_bytes, write_rows, write_tables
from tasks.rows import from_table, to_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    number: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    name: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    parts: tuple[Number, ...]


def row(name: str, *texts: str) -> Row:
    return Row(name=name, parts=tuple(Part(number=n, text=t) for n, t in enumerate(texts)))


@contextmanager
def bounds(group: int, file: int = tables.FILE_BYTES) -> Iterator[None]:
    """Row groups and files of so many bytes of text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "GROUP_BYTES", group)
        patch.setattr(tables, "FILE_BYTES", file)
        yield


def size(row: Row) -> int:
    texts = (row.name, *(part.text for part in row.parts))
    return sum(len(text.encode()) for text in texts) + 8 * len(row.parts)


def groups(path: Path) -> list[int]:
    """The size of each row group, as the file's reader finds it."""
    with pq.ParquetFile(path) as file:
        tables = [file.read_row_group(n) for n in range(file.num_row_groups)]
    return [sum(map(size, from_table(table, Row))) for table in tables]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(deadline=None, max_examples=50)  # no timing decides
@given(st.lists(st.builds(row, texts, texts, texts), max_size=30), st.integers(1, 400))
def test_a_group_has_the_bound_or_one_row(rows: list[Row], bound: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        with bounds(bound):
            write_rows(path, rows, Row)
        longest = max(map(size, rows), default=0)
        assert all(size <= max(bound, longest) for size in groups(path))
        assert list(StoredRows.at(path, Row)) == rows


def test_text_counts_in_utf8_and_a_number_eight() -> None:
    rows = [row("é", "日本", "plain"), row("", ""), row("abc")]
    assert row_bytes(to_table(rows, Row)).tolist() == [2 + 6 + 5 + 16, 8, 3]
    assert row_bytes(to_table(rows, Row).slice(1)).tolist() == [8, 3]


def test_long_rows_stand_alone_and_short_ones_together(tmp_path: Path) -> None:
    rows = [row("a", "x" * 3), row("b", "x" * 3), row("c", "x" * 50), row("d", "x")]
    with bounds(26):
        write_rows(tmp_path / "rows.parquet", rows, Row)
    assert groups(tmp_path / "rows.parquet") == [24, 59, 10]
    assert list(StoredRows.at(tmp_path / "rows.parquet", Row)) == rows


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [row(str(n), "x" * n) for n in range(40)]
    with bounds(100):
        write_rows(tmp_path / "a.parquet", rows, Row)
    with bounds(100):
        write_rows(tmp_path / "b.parquet", iter(rows), Row)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_no_rows_have_their_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", [], Row)
    assert list(StoredRows.at(tmp_path / "rows.parquet", Row)) == []
    assert pq.read_schema(tmp_path / "rows.parquet").names == ["name", "parts"]


def test_a_long_table_is_a_folder_of_files(tmp_path: Path) -> None:
    path, rows = tmp_path / "rows.parquet", [row(str(n), "x" * n) for n in range(40)]
    with bounds(100, 200):
        write_rows(path, rows, Row)
    files = sorted(path.iterdir())
    assert len(files) > 3 and all(sum(groups(file)) <= 200 for file in files)
    assert list(StoredRows.at(path, Row)) == rows
    assert from_table(pq.read_table(path), Row) == rows, "others read it by its path, too"
    write_rows(path, rows[:2], Row)
    assert path.is_file() and list(StoredRows.at(path, Row)) == rows[:2], (
        "a shorter one takes its place"
    )
    assert list(tmp_path.iterdir()) == [path]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.builds(row, texts, texts, texts), max_size=30), st.data())
def test_files_do_not_depend_on_the_pieces(rows: list[Row], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=5)))
    ends = zip([0, *cuts], [*cuts, len(rows)], strict=True)
    pieces = [to_table(rows[a:b], Row) for a, b in ends]
    with tempfile.TemporaryDirectory() as folder:
        whole, pieced = Path(folder) / "whole.parquet", Path(folder) / "pieced.parquet"
        with bounds(60, 150):
            write_rows(whole, rows, Row)
        with bounds(60, 150):
            write_tables(pieced, pieces, Row)
        assert contents(whole) == contents(pieced)


def contents(path: Path) -> list[bytes]:
    return [file.read_bytes() for file in (sorted(path.iterdir()) if path.is_dir() else [path])]


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    path, rows = (
        tmp_path_factory.mktemp("forty") / "t.parquet",
        [row(str(n), "y") for n in range(40)],
    )
    with bounds(20, 45):
        write_rows(path, rows, Row)
    return path, rows


def test_slices_are_read_when_they_are_asked_for(forty: tuple[Path, list[Row]]) -> None:
    path, rows = forty
    found = StoredRows.at(path, Row)
    assert len(found) == 40 and list(found) == rows == list(found), "as often as one likes"
    for start in range(0, 41, 7):
        for stop in range(0, 41, 5):
            assert list(found[start:stop]) == rows[start:stop]
            assert list(found[start:][: stop - start]) == rows[start:][: stop - start]
    assert (found[0], found[39], found[-1]) == (rows[0], rows[39], rows[39])
    assert list(pickle.loads(pickle.dumps(found[9:23]))) == rows[9:23]
    with pytest.raises(IndexError):
        found[40]


def test_columns_that_a_type_lacks_are_not_read(forty: tuple[Path, list[Row]]) -> None:
    path, rows = forty
    found = StoredRows.at(path, Numbers)
    assert [p.number for r in found for p in r.parts] == [p.number for r in rows for p in r.parts]
    assert all("text" not in str(table.schema) for table in found.tables())


def test_tables_side_by_side(forty: tuple[Path, list[Row]]) -> None:
    path, rows = forty
    both = Beside(StoredRows.at(path, Row), StoredRows.at(path, Numbers))
    assert [(left, len(right.parts)) for left, right in both[5:9]] == [(r, 1) for r in rows[5:9]]
    assert both[7][0] == rows[7]
    with pytest.raises(ValueError, match="40 rows beside 39"):
        Beside(StoredRows.at(path, Row), StoredRows.at(path, Row)[1:])
