"""Data files in the forms in which they come: the right rows, or one refusal that names the cause."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from hostile.data_inputs import INPUTS, DataInput

from constitutions.errors import UserError
from tasks.benchmarks.rows import read_records
from tasks.corpus.prompts import CorpusSettings, load_corpus


def made(given: DataInput, folder: Path) -> Path:
    path = folder / given.file
    if callable(given.content):
        given.content(path)
    elif isinstance(given.content, str):
        path.write_bytes(given.content.encode())
    else:
        path.write_bytes(given.content)
    return path


@pytest.mark.parametrize("given", [i for i in INPUTS if i.reads], ids=lambda given: given.name)
def test_is_read(given: DataInput, tmp_path: Path) -> None:
    rows = load_corpus([CorpusSettings(path=str(made(given, tmp_path)))]).rows
    assert tuple((row.prompt[-1]["content"], row.gold) for row in rows) == given.reads
    assert all(row.prompt[-1]["role"] == "user" for row in rows)


@pytest.mark.parametrize("given", [i for i in INPUTS if i.says], ids=lambda given: given.name)
def test_is_refused_by_name(given: DataInput, tmp_path: Path) -> None:
    path = made(given, tmp_path)
    with pytest.raises(UserError) as caught:
        load_corpus([CorpusSettings(path=str(path))])
    said = str(caught.value)
    assert str(path) in said
    assert [words for words in given.says if words not in said] == []
    assert len(said) < 10_000


@pytest.mark.parametrize(
    "name", ["a pipe", "a column twice", "a sparse line", "a key twice in a list"]
)
def test_a_benchmark_s_file_is_read_within_the_same_bounds(name: str, tmp_path: Path) -> None:
    given = next(i for i in INPUTS if i.name == name)
    with pytest.raises(UserError) as caught:
        read_records(made(given, tmp_path), dict)
    assert [words for words in given.says if words not in str(caught.value)] == []
