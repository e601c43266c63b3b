"""One parser for what others write: its value, or one message that names the place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from constitutions.errors import UserError
from constitutions.parse import LARGE, SMALL, Bounds, parse_json, parse_yaml, read_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: [1, 2.5, yes, null, 'x']", {"a": [1, 2.5, True, None, "x"]}),
        (
            "a: &a {b: 1}\nc: {<<: *a, d: 2}\ne: *a",
            {"a": {"b": 1}, "c": {"b": 1, "d": 2}, "e": {"b": 1}},
        ),
        (
            "a: &a {b: 1, c: 2}\nd: &d {<<: *a, b: 3}\ne: {<<: *d}",
            {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}, "e": {"b": 3, "c": 2}},
        ),
        ("1: a\n'1': b", {1: "a", "1": "b"}),
    ],
)
def test_plain_values(text: str, value: object) -> None:
    assert parse_yaml(text, "x.yaml") == value


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: 1\nb: 2024-13-45", 2, "a date"),
        ("a: !!int abc", 1, "'abc' is not of the type int"),
        ("a:\n- " + "9" * 5_000, 2, "not of the type int"),
        ("a: 9223372036854775808", 1, "too large"),
        ("a: .inf", 1, "not finite"),
        ("a: 1\na: 2", 2, "'a' is given twice"),
        ("? [a]\n: 1", 1, "a key is a list"),
        ("a: &a\n  b: *a", 2, "'*a' is a part of itself"),
        ("a: " + "[" * 5_000, 1, "deeper than 64"),
        ('a: "\\0"', 1, "NUL"),
        ("a: !!python/name:os.system", 1, "could not determine a constructor"),
        ("a: !!binary aGk=", 1, "binary data"),
        ("a: ]", 1, ""),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else str(value),
)
def test_what_is_no_plain_value_is_named_by_its_line(text: str, line: int, said: str) -> None:
    with pytest.raises(UserError, match=rf"x\.yaml, line {line}") as caught:
        parse_yaml(text, "x.yaml")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300


def test_aliases_count_as_what_they_stand_for() -> None:
    ten = "a: &a [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\nb: ["
    assert len(parse_yaml(ten + "*a, " * 8 + "]", "x", Bounds(1_000, 120))["b"]) == 8
    with pytest.raises(UserError, match="more than 120 values"):
        parse_yaml(ten + "*a, " * 12 + "]", "x", Bounds(1_000, 120))
    long = f"a: &a '{'y' * 100_000}'\nb: [" + "*a, " * 5_000 + "]"
    with pytest.raises(UserError, match="more than"):
        parse_yaml(long, "x", SMALL)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ("[" * 100_000, "not JSON"),
        ("[" * 70 + "]" * 70, "deeper than 64"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ("[1e999]", "not a finite number"),
        ("[" + "9" * 5_000 + "]", "too large"),
        ("[" + "1," * LARGE.nodes + "1]", "more than"),
    ],
    ids=["twice", "deep", "70 levels", "NaN", "1e999", "digits", "many"],
)
def test_json_within_bounds(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_json(text, "x.json")
    assert parse_json('{"a": [1, -2.5, "\\u00e9", null]}', "x") == {"a": [1, -2.5, "é", None]}


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b"x" * 11)
    (tmp_path / "fine").write_text("é", encoding="utf-8-sig")
    ten = Bounds(10, 10)
    assert read_text(tmp_path / "fine", ten) == "é"
    for name, said in {
        "fifo": "no regular file",
        "large": "too large",
        ".": "directory",
        "none": "no such file",
        "x" * 5_000: "name too long",
        "a\0b": "null byte",
    }.items():
        with pytest.raises(UserError, match=f"(?i){said}"):
            read_text(tmp_path / name, ten)
    with pytest.raises(UserError, match="no regular file"):
        read_text("/dev/zero")
