"""Tokenised conversations on disk, and what training reads of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.training.encoding import EncodedExample
from models.training.examples import StoredExamples

EXAMPLES = [
    EncodedExample(
        tuple(range(n, 3 * n)), tuple(i % 3 == 0 for i in range(2 * n)), n / 7, (n, 1) * (n % 2)
    )
    for n in range(1, 600)
]


def plain(example: EncodedExample) -> tuple[list[int], list[bool], float, list[int]]:
    return list(example.ids), list(example.trained), example.weight, list(example.taught)


def test_examples_are_read_back_by_their_numbers(tmp_path: Path) -> None:
    found = StoredExamples.write(tmp_path / "examples.arrow", iter(EXAMPLES))
    assert len(found) == len(EXAMPLES)
    assert list(map(plain, found)) == list(map(plain, EXAMPLES))
    for number in (0, 15, 16, 598, -1):
        assert plain(found[number]) == plain(EXAMPLES[number])
    assert list(map(plain, found[10:20])) == list(map(plain, EXAMPLES[10:20]))
    with pytest.raises(IndexError):
        found[599]
    assert [path.name for path in tmp_path.iterdir()] == ["examples.arrow"]


def test_no_examples(tmp_path: Path) -> None:
    assert len(StoredExamples.write(tmp_path / "examples.arrow", [])) == 0


def test_the_same_examples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        StoredExamples.write(tmp_path / name, EXAMPLES)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
