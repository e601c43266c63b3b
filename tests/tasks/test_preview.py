"""The first rows of a table, as MLflow's page shows them."""

from __future__ import annotations

import json
from pathlib import Path

from tasks.record.preview import CHARACTERS, ROWS, preview
from tasks.record.tables import write_rows
from tasks.rows import Candidate, Mined, Rejected

SECRET = "see https://ann:PASSWORD@host/"


def mined(number: int) -> Mined:
    return Mined(
        prompt_id=str(number),
        prompt=({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}),
        gold=SECRET,
        source="rows.jsonl:1",
        initial="é" * 9_000,
        initial_finish="stop",
        initial_tokens=3,
        candidates=tuple(
            Candidate(sample=n, principle=f"P{n}", critique="", refined="", finish="stop", tokens=n)
            for n in range(3)
        ),
    )


def test_a_row_for_each_candidate_short_and_without_passwords(tmp_path: Path) -> None:
    write_rows(tmp_path / "mined.parquet", map(mined, range(300)), Mined)
    found = preview(tmp_path / "mined.parquet")
    first, fifth = (dict(zip(found["columns"], found["data"][n], strict=True)) for n in (0, 4))
    assert len(found["data"]) == ROWS
    assert (fifth["prompt_id"], fifth["sample"], fifth["principle"]) == ("1", 1, "P1")
    assert first["prompt"] == "Be kind.\nWho?" and len(first["initial"]) == CHARACTERS
    text = json.dumps(found)
    assert "PASSWORD" not in text and "https://***@host/" in text


def test_no_rows_have_their_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "rejected.parquet", [], Rejected)
    found = preview(tmp_path / "rejected.parquet")
    assert found["columns"][:2] == ["prompt_id", "sample"] and found["data"] == []
