"""Row groups: bounded whatever the rows hold, and read one by one."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.record.tables import read_rows, text_bytes, write_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    number: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    name: str
    parts: tuple[Part, ...]


def row(name: str, *texts: str) -> Row:
    return Row(name=name, parts=tuple(Part(number=n, text=t) for n, t in enumerate(texts)))


def groups(path: Path) -> list[int]:
    """Bytes of text in each row group, as the file's reader finds them."""
    with pq.ParquetFile(path) as file:
        tables = [file.read_row_group(n) for n in range(file.num_row_groups)]
    return [sum(map(text_bytes, table.to_pylist())) for table in tables]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(deadline=None, max_examples=50)  # no timing decides
@given(st.lists(st.builds(row, texts, texts, texts), max_size=30), st.integers(1, 400))
def test_a_group_has_the_bound_or_one_row(rows: list[Row], bound: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        write_rows(path, rows, Row, bound)
        longest = max(map(text_bytes, rows), default=0)
        assert all(size <= max(bound, longest) for size in groups(path))
        assert read_rows(path, Row) == rows


def test_text_counts_in_utf8() -> None:
    assert text_bytes(row("é", "日本", "plain")) == 2 + 6 + 5


def test_long_rows_stand_alone_and_short_ones_together(tmp_path: Path) -> None:
    rows = [row("a", "x" * 3), row("b", "x" * 3), row("c", "x" * 50), row("d", "x")]
    write_rows(tmp_path / "rows.parquet", rows, Row, group_bytes=10)
    assert groups(tmp_path / "rows.parquet") == [8, 51, 2]
    assert read_rows(tmp_path / "rows.parquet", Row) == rows


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [row(str(n), "x" * n) for n in range(40)]
    write_rows(tmp_path / "a.parquet", rows, Row, group_bytes=100)
    write_rows(tmp_path / "b.parquet", iter(rows), Row, group_bytes=100)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_no_rows_have_their_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", [], Row)
    assert read_rows(tmp_path / "rows.parquet", Row) == []
    assert pq.read_schema(tmp_path / "rows.parquet").names == ["name", "parts"]
