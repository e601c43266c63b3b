"""The first rows of a stage's table, as MLflow's page shows a table: it cannot read Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from constitutions.untrusted import hide_passwords

ROWS = 200
CHARACTERS = 500
"""Of a text in a cell; what is longer ends with an ellipsis."""
LISTS = ("candidates", "draws")
"""Columns of which each item gets a row of its own."""
SHOWN = "mlflow.loggedArtifacts"
"""Tag of a run: its files that MLflow's page shows as tables."""


def preview(path: Path) -> dict[str, list[Any]]:
    """At most `ROWS` rows of a Parquet file or folder: {"columns": names, "data": rows}."""
    first = path if path.is_file() else min(path.glob("*.parquet"))
    with pq.ParquetFile(first) as table:
        rows = list(islice(_rows(table), ROWS))
        columns = list(rows[0]) if rows else table.schema_arrow.names
    return {"columns": columns, "data": [[_cell(value) for value in row.values()] for row in rows]}


def shown(names: list[str]) -> str:
    """The value of the tag `SHOWN`."""
    return json.dumps([{"path": name, "type": "table"} for name in names])


def _rows(table: pq.ParquetFile) -> Iterator[Mapping[str, Any]]:
    for batch in table.iter_batches(ROWS):
        for row in batch.to_pylist():
            items = [item for name in LISTS for item in row.pop(name, ())]
            yield from ({**row, **item} for item in items or [{}])


def _cell(value: Any) -> Any:
    """A number as it is, a prompt as its messages' texts, all else as a short text."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list) and value and isinstance(value[0], dict) and "content" in value[0]:
        value = "\n".join(message["content"] for message in value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = hide_passwords(text)
    return text if len(text) <= CHARACTERS else text[: CHARACTERS - 1] + "…"
