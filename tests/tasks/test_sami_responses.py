"""Response files of SAMI's reference, as its authors published them: read and paired."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripted import decide_all

from constitutions.errors import UserError, UserErrors
from models.judges.base import Judgement
from tasks.judging.pairs import OUTSIDE
from tasks.rows import from_table, to_table
from tasks.sami.responses import (
    JudgedRow,
    ResponseRow,
    judged_rows,
    read_responses,
    response_pairs_of,
    with_constitution,
)

Columns = dict[str, Any]


def columns(**responses: str) -> Columns:
    """A file's content: keys to responses, each to a question of its own."""
    return {
        "constitution": dict.fromkeys(responses, "1. Be brief."),
        "question": {k: f"What is {k}?" for k in responses},
        "response": dict(responses),
    }


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(content: Any, name: str = "ours.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return written


# The published files -------------------------------------------------------------------------


def test_the_published_files_are_read_and_paired(sami_responses: tuple[Path, Path]) -> None:
    ours, theirs = map(read_responses, sami_responses)
    raw = [json.loads(path.read_text("utf-8")) for path in sami_responses]
    assert len(ours.rows) == len(theirs.rows) == 250
    pairs, rows, rejected = response_pairs_of(ours, theirs)
    assert len(pairs) == len(rows) == 250 and not rejected
    for pair in pairs:
        key = rows[pair.prompt.prompt_id].key
        assert pair.prompt.source == f"{sami_responses[0].name}:{key}"
        assert pair.prompt.prompt == ({"role": "user", "content": raw[0]["question"][key]},)
        assert pair.principle == raw[0]["constitution"][key]
        assert pair.ours.text == raw[0]["response"][key]
        assert pair.theirs.text == raw[1]["response"][key]
        assert (pair.against, pair.reference) == (OUTSIDE, sami_responses[1].name)
        assert not pair.prompt.gold


def test_any_text_survives(write: Any) -> None:
    texts = ["", " \n", "é\u2028\x00\ud7ff🙂", '"}\\', "</s>"]
    content = {
        "constitution": {str(i): f"c{t}" for i, t in enumerate(texts)},
        "question": {str(i): f"q{t}" for i, t in enumerate(texts)},
        "response": {str(i): t for i, t in enumerate(texts)},
    }
    assert list(read_responses(write(content)).rows) == [
        ResponseRow(key=str(i), question=f"q{t}", constitution=f"c{t}", response=t)
        for i, t in enumerate(texts)
    ]


# Pairs ---------------------------------------------------------------------------------------


def test_rows_are_joined_by_key_and_every_row_is_paired_or_rejected(write: Any) -> None:
    ours = read_responses(write(columns(a="A", b="B", c="C")))
    theirs = read_responses(write(columns(d="d", c="c", a="a"), "theirs.json"))
    pairs, rows, rejected = response_pairs_of(ours, theirs)
    assert [(m.ours.text, m.theirs.text) for m in pairs] == [("A", "a"), ("C", "c")]
    assert [row.key for row in rows.values()] == ["a", "c"]
    assert [(r.source, r.reason, r.sample) for r in rejected] == [
        ("ours.json:b", "no counterpart", None), ("theirs.json:d", "no counterpart", None),
    ]  # fmt: skip
    assert "theirs.json" in rejected[0].detail and "ours.json" in rejected[1].detail


def test_a_question_under_two_constitutions_is_two_prompts(write: Any) -> None:
    content = columns(a="A", b="B", c="C")
    content["question"] = dict.fromkeys("abc", "Why?")
    content["constitution"]["b"] = "1. Be long."
    file = read_responses(write(content))
    pairs, _, rejected = response_pairs_of(file, file)
    assert [m.principle for m in pairs] == ["1. Be brief.", "1. Be long."]
    assert len({m.prompt.prompt_id for m in pairs}) == 2
    assert [(r.source, r.reason) for r in rejected] == [("ours.json:c", "duplicate")]
    assert "key 'a'" in rejected[0].detail


@pytest.mark.parametrize("column", ["question", "constitution"])
def test_a_key_that_stands_for_two_things_is_refused(write: Any, column: str) -> None:
    other = columns(a="a", b="b", c="c")
    other[column]["b"], other[column]["c"] = other[column]["c"] + "!", "Another."
    ours = read_responses(write(columns(a="A", b="B", c="C")))
    theirs = read_responses(write(other, "theirs.json"))
    with pytest.raises(UserErrors) as caught:
        response_pairs_of(ours, theirs)
    assert len(caught.value.errors) == 2
    said = str(caught.value)
    assert f"the {column} is another one" in said and "key 'b'" in said and "theirs.json" in said


def test_files_without_a_common_key_are_refused(write: Any) -> None:
    ours = read_responses(write(columns(a="A")))
    theirs = read_responses(write(columns(b="B"), "theirs.json"))
    with pytest.raises(UserError, match="no key in common"):
        response_pairs_of(ours, theirs)


def test_a_judge_that_reads_no_principle_reads_it_in_the_request(write: Any) -> None:
    file = read_responses(write(columns(a="A")))
    (pair,) = response_pairs_of(file, file).pairs
    shown = with_constitution(pair)
    assert shown.prompt.prompt == ({"role": "user", "content": "1. Be brief.\n\nWhat is a?"},)
    assert shown.prompt.prompt_id == pair.prompt.prompt_id


def test_comparisons_keep_their_keys(write: Any) -> None:
    class First:
        name, ordered = "first", False

        def compare(self, pairs: Any, advance: Any = None) -> list[Judgement]:
            return [Judgement(outcome=float(p.ours == "B")) for p in pairs]

    ours = read_responses(write(columns(a="A", b="B", c="")))
    theirs = read_responses(write(columns(c="x", b="x", a="x"), "theirs.json"))
    paired = response_pairs_of(ours, theirs)
    rows = judged_rows(paired, decide_all(paired.pairs, First()))
    assert [(r.key, r.outcome, r.asked) for r in rows] == [
        ("a", 0.0, True), ("b", 1.0, True), ("c", 0.0, False),
    ]  # fmt: skip
    assert rows[1].question == "What is b?" and rows[1].constitution == "1. Be brief."
    assert from_table(to_table(rows, JudgedRow), JudgedRow) == rows


# Hostile files -------------------------------------------------------------------------------


def changed(column: str, key: str, value: Any) -> Columns:
    content = columns(a="A", b="B")
    content[column][key] = value
    return content


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", ["not JSON"]),
        ("{", ["not JSON"]),
        ("[" * 100_000, ["not JSON"]),
        ('{"prompt": "a"}\n{"prompt": "b"}', ["not JSON"]),
        ([1], ["list", "constitution"]),
        ({"response": {"0": "a"}}, ["column 'constitution'", "column 'question'", "missing"]),
        ({**columns(a="A"), "question": ["What?"]}, ["column 'question'", "list"]),
        ({**columns(a="A"), "response": None}, ["column 'response'", "null"]),
        (columns(), ["no rows"]),
        ({**columns(a="A"), "question": {}}, ["key 'a'", "no question"]),
        ({**columns(a="A"), "response": {"b": "B"}}, ["key 'a'", "no response", "key 'b'"]),
        (changed("response", "b", None), ["column 'response', key 'b'", "null"]),
        (changed("response", "b", 3.5), ["key 'b'", "float"]),
        (changed("question", "a", ["x"]), ["column 'question', key 'a'", "list"]),
        (changed("constitution", "a", " \n"), ["column 'constitution', key 'a'", "empty"]),
        (changed("response", "a", "x\ud83d"), ["key 'a'", "surrogate", "place 1"]),
        ('{"constitution": {"0": "a", "0": "b"}, "question": {}}', ["'0' occurs twice"]),
        (
            '{"constitution": {"0": NaN}, "question": {"0": "q"}, "response": {"0": ""}}',
            ["not JSON", "NaN"],
        ),
    ],
)
def test_what_is_wrong_is_named(write: Any, content: Any, named: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_responses(write(content))
    for part in [*named, "ours.json"]:
        assert part in str(caught.value)


def test_everything_wrong_is_said_at_once_but_not_without_end(write: Any) -> None:
    content = columns(**{f"k{i}": "x" for i in range(50)})
    content["response"] = dict.fromkeys(content["response"], 1)
    del content["question"]["k7"]
    with pytest.raises(UserErrors) as caught:
        read_responses(write(content))
    assert len(caught.value.errors) == 20 and caught.value.more == 31
    assert "k7" in str(caught.value.errors[0])


def test_what_is_no_file_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_responses(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="directory"):
        read_responses(tmp_path)
    (tmp_path / "bad.json").write_bytes(b'{"constitution": {"0": "\xff"}}')
    with pytest.raises(UserError, match=r"bad\.json.*byte 24.*UTF-8"):
        read_responses(tmp_path / "bad.json")


def test_an_empty_response_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(columns(a="")), encoding="utf-8-sig")
    (row,) = read_responses(tmp_path / "a.json").rows
    assert row.response == ""
