"""Input: what is read, what is refused, and with which words."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from constitutions.errors import UserError
from tasks.corpus.prompts import CorpusSettings, load_corpus, shuffle_golds, source_digests, split
from tasks.rows import Prompt

ROWS = [{"prompt": f"What is {i}?", "gold": f"It is {i}."} for i in range(6)]


def jsonl(path: Path, rows: Sequence[Mapping[str, Any] | bytes | str]) -> CorpusSettings:
    lines = [
        r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode()
        for r in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return CorpusSettings(path=str(path))


def refusal(*sources: CorpusSettings) -> str:
    with pytest.raises(UserError) as caught:
        load_corpus(sources)
    return str(caught.value)


def prompts(rows: Sequence[Prompt]) -> list[str]:
    return [row.prompt[-1]["content"] for row in rows]


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "gold"])
        writer.writeheader()
        writer.writerows(ROWS)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "csv"])
def test_every_file_kind_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    lines = "\n".join(map(json.dumps, ROWS))
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode(), mtime=0))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        write_csv(path)
    rows = load_corpus([CorpusSettings(path=str(path))]).rows
    assert prompts(rows) == [r["prompt"] for r in ROWS]
    assert [r.gold for r in rows] == [r["gold"] for r in ROWS]
    assert rows[2].source == f"rows.{kind}:3"


def test_jsonl_under_the_name_json_is_read(tmp_path: Path) -> None:
    assert len(load_corpus([jsonl(tmp_path / "rows.json", ROWS)]).rows) == len(ROWS)


def test_chat_messages_are_kept_turn_by_turn(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Why?"},
    ]
    source = jsonl(tmp_path / "chat.jsonl", [{"prompt": turns, "gold": "Because."}])
    assert list(load_corpus([source]).rows[0].prompt) == turns


def test_columns_are_mapped(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"ask": "x", "best": "y"}]).path
    source = CorpusSettings(path=path, prompt_column="ask", gold_column="best")
    assert load_corpus([source]).rows[0].gold == "y"


GOOD = {"prompt": "fine", "gold": "good"}
BAD_ROWS = [
    ({"prompt": "p"}, ["row 2", "'gold'", "missing", "fields here: prompt"]),
    ({"prompt": "p", "gold": None}, ["row 2", "'gold'", "null", "a text"]),
    ({"prompt": "p", "gold": " \n"}, ["row 2", "'gold'", "empty"]),
    ({"prompt": "", "gold": "g"}, ["row 2", "'prompt'", "empty"]),
    ({"prompt": 7, "gold": "g"}, ["row 2", "'prompt'", "type int", "chat messages"]),
    ({"prompt": "p", "gold": ["g", 7]}, ["row 2", "'gold'", "type list"]),
    ({"prompt": "fine", "gold": "g"}, ["row 2", "'prompt'", "same prompt as bad.jsonl:1"]),
    ({"prompt": "p" * 200_000, "gold": "g"}, ["row 2", "'prompt'", "200,000 characters", "at most 20,000"]),
    ({"prompt": "p", "gold": "g" * 200_000}, ["row 2", "'gold'", "200,000 characters"]),
    (b'{"prompt": "caf\xe9", "gold": "g"}', ["row 2", "'prompt'", "byte 0xe9", "character 4", "UTF-8"]),
    ({"prompt": "p", "gold": "\ud83d"}, ["row 2", "'gold'", "\\ud83d", "UTF-8"]),
    ('{"prompt": "p", ', ["row 2", "not JSON"]),
    ("[" * 100_000, ["row 2", "not JSON"]),
    ('["p", "g"]', ["row 2", "type list", "a JSON object"]),
    ({"prompt": [], "gold": "g"}, ["row 2", "'prompt'", "no messages"]),
    ({"prompt": ["hi"], "gold": "g"}, ["row 2", "'prompt[0]'", "type str", "role"]),
    ({"prompt": [{"role": "bot", "content": "hi"}], "gold": "g"}, ["'prompt[0]'", "'bot'", '"assistant"']),
    ({"prompt": [{"role": "user", "content": 3}], "gold": "g"}, ["'prompt[0].content'", "type int"]),
    (
        {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "gold": "g"},
        ["row 2", "'prompt'", "user's turn"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "words"), BAD_ROWS)
def test_a_bad_row_is_refused_by_file_row_and_field(
    tmp_path: Path, row: Any, words: list[str]
) -> None:
    source = jsonl(tmp_path / "bad.jsonl", [GOOD, row])
    message = refusal(source)
    assert [word for word in [str(source.path), *words] if word not in message] == []
    assert "\n" not in message


@pytest.mark.parametrize(("row", "words"), BAD_ROWS)
def test_a_bad_row_can_be_left_out_but_not_lost(tmp_path: Path, row: Any, words: list[str]) -> None:
    path = jsonl(tmp_path / "bad.jsonl", [GOOD, row, ROWS[0]]).path
    corpus = load_corpus([CorpusSettings(path=path, on_bad_row="reject")])
    assert prompts(corpus.rows) == ["fine", ROWS[0]["prompt"]]
    (rejected,) = corpus.rejected
    assert rejected.source == "bad.jsonl:2"
    assert rejected.reason
    assert rejected.detail


def test_all_problems_of_all_files_are_reported_at_once(tmp_path: Path) -> None:
    many = jsonl(
        tmp_path / "many.jsonl",
        [GOOD, *({"prompt": str(i), "gold": "" if i % 2 else None} for i in range(50))],
    )
    missing = CorpusSettings(path=str(tmp_path / "missing.jsonl"))
    lines = refusal(many, missing).splitlines()
    assert len(lines) == 22
    assert "row 2," in lines[0]
    assert "row 21," in lines[19]
    assert "missing.jsonl" in lines[20]
    assert "no such file" in lines[20]
    assert "30 more" in lines[21]


def test_a_column_that_no_row_has_is_said_once(tmp_path: Path) -> None:
    lines = refusal(jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(30)])).splitlines()
    assert len(lines) == 2
    assert "fields here: text" in lines[0]
    assert "prompt_column" in lines[0]
    assert "29 more" in lines[1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"hello", "files of type .txt"),
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "p", "gold": "g"}' * 99, mtime=0)[:-20], "cannot be read"),
        ("a.parquet", b"not parquet", "not Parquet"),
        ("a.json", b"[1, 2", "not JSON"),
        ("a.csv", b'prompt,gold\n"open,quote\n', "not CSV"),
        ("a.csv", b"prompt,gold\na,b,c\n", "row has 3 fields; expected 2"),
        ("a.csv", b"prompt,gold\na\n", "row has 1 fields; expected 2"),
        ("a.csv", b"prompt,gold\n" + b"x" * 200_000 + b",b\n", "200,000 characters"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(CorpusSettings(path=str(path)))
    assert str(path) in message
    assert words in message


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "this is a folder" in refusal(CorpusSettings(path=str(tmp_path)))


def test_broken_text_in_parquet_names_row_and_field(tmp_path: Path) -> None:
    offsets, data = pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xff\xfe")
    broken = pa.StringArray.from_buffers(2, offsets, data)
    pq.write_table(pa.table({"prompt": ["x", "y"], "gold": broken}), tmp_path / "a.parquet")
    message = refusal(CorpusSettings(path=str(tmp_path / "a.parquet")))
    assert "row 2, field 'gold'" in message
    assert "0xff" in message


def test_a_source_has_one_origin() -> None:
    for given in ({}, {"path": "a.jsonl", "name": "b"}):
        with pytest.raises(ValidationError, match="either a path or the name"):
            CorpusSettings(**given)


def test_sources_are_mixed_and_a_prompt_of_two_files_is_a_duplicate(tmp_path: Path) -> None:
    first = jsonl(tmp_path / "first.jsonl", ROWS[:3])
    second = jsonl(tmp_path / "second.jsonl", ROWS[2:])
    assert "same prompt as first.jsonl:3" in refusal(first, second)
    corpus = load_corpus([first, second.model_copy(update={"on_bad_row": "reject"})])
    assert len(corpus.rows) == len(ROWS)
    assert [r.reason for r in corpus.rejected] == ["duplicate"]
    assert corpus.rejected[0].prompt_id == corpus.rows[2].prompt_id


def test_rows_are_drawn_by_the_seed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": str(i), "gold": "g"} for i in range(40)]).path
    source = CorpusSettings(path=path, rows=10)
    draws = [prompts(load_corpus([source], seed).rows) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == sorted(draws[0], key=int)
    assert len(draws[0]) == 10


def test_digests_tell_whether_a_source_changed(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ROWS)
    before = source_digests([source])
    assert source_digests([source]) == before
    jsonl(tmp_path / "a.jsonl", ROWS[:-1])
    assert source_digests([source]) != before


def some_rows(n: int, golds: int) -> list[Prompt]:
    return [
        Prompt(prompt_id=f"{i:04}", prompt=(), gold=f"gold {i % golds}", source=f"a:{i}")
        for i in range(n)
    ]


def test_split_is_disjoint_and_hardly_moved_by_a_new_row() -> None:
    rows, sizes = some_rows(300, 300), [50, 100, 60]
    parts = split(rows[:-1], sizes, 0)
    assert [len(part) for part in parts] == sizes
    assert len({row.prompt_id for part in parts for row in part}) == sum(sizes)
    assert split(rows[-2::-1], sizes, 0) == parts
    assert split(rows[:-1], sizes, 1) != parts
    for before, after in zip(parts, split(rows, sizes, 0), strict=True):
        assert len({r.prompt_id for r in before} - {r.prompt_id for r in after}) <= 1


def test_split_says_how_many_rows_are_needed() -> None:
    with pytest.raises(UserError, match=r"has 10 usable prompts, the experiment needs 12"):
        split(some_rows(10, 10), [4, 8], 0)


@pytest.mark.parametrize(("n", "golds"), [(2, 2), (50, 50), (50, 2), (51, 4)])
def test_no_prompt_keeps_its_gold(n: int, golds: int) -> None:
    rows = some_rows(n, golds)
    shuffled = shuffle_golds(rows, 3)
    assert [r.prompt_id for r in shuffled] == [r.prompt_id for r in rows]
    assert all(new.gold != old.gold for new, old in zip(shuffled, rows, strict=True))
    assert sorted(r.gold for r in shuffled) == sorted(r.gold for r in rows)


def test_no_prompt_keeps_any_of_several_golds() -> None:
    rows = [replace(r, other_golds=(f"{r.gold} too", "shared")) for r in some_rows(9, 9)]
    for new, old in zip(shuffle_golds(rows, 3), rows, strict=True):
        assert new.golds == (new.gold, f"{new.gold} too") and not set(new.golds) & set(old.golds)
    rows = [replace(r, other_golds=tuple(o.gold for o in rows if o != r)) for r in rows]
    with pytest.raises(UserError, match=r"a prompt has all those of another one"):
        shuffle_golds(rows, 3)


def test_golds_that_are_mostly_alike_cannot_be_shuffled() -> None:
    with pytest.raises(UserError, match="cannot be shuffled"):
        shuffle_golds([*some_rows(2, 2), *some_rows(3, 1)], 0)


# The four corpora's own formats

HH = "\n\nHuman: How?\n\nAssistant: So.\n\nHuman: Why?\n\nAssistant: Because.\n\nIt is."


@pytest.mark.parametrize(
    ("record", "prompt", "gold"),
    [
        ({"chosen": HH, "rejected": HH}, ["How?", "So.", "Why?"], "Because.\n\nIt is."),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, ["p"], "c"),
        (
            {"prompt": "p", "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]},
            ["p"],
            "c",
        ),
        ({"query": "POST: a\n\nTL;DR:", "reference_responses": "  b"}, ["POST: a\n\nTL;DR:"], "b"),
        ({"query": "q", "reference_responses": ["b", "c"]}, ["q"], "b"),
        (
            {"question": "Q?", "context": [["T", ["One.", " Two."]], ["U", ["Three."]]], "answer": "yes"},
            ["T\nOne. Two.\n\nU\nThree.\n\nQuestion: Q?"],
            "yes",
        ),
        (
            {"question": "Q?", "context": {"title": ["T"], "sentences": [["One."]]}, "answer": "yes"},
            ["T\nOne.\n\nQuestion: Q?"],
            "yes",
        ),
    ],
)  # fmt: skip
def test_formats_are_detected_by_their_columns(
    tmp_path: Path, record: Any, prompt: list[str], gold: str
) -> None:
    (row,) = load_corpus([jsonl(tmp_path / "a.jsonl", [record])]).rows
    assert [turn["content"] for turn in row.prompt] == prompt
    assert row.gold == gold
    assert row.prompt[-1]["role"] == "user"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_prompt_may_have_several_golds(tmp_path: Path, kind: str) -> None:
    """The first is shown; equal ones count once; each is checked."""
    records = [{"prompt": f"p{i}", "gold": golds} for i, golds in enumerate(
        (["a", "b", "a", "c"], ["one"], ["x" * 20_001, "y"], ["d", " "])
    )]  # fmt: skip
    if kind == "jsonl":
        source = jsonl(tmp_path / "a.jsonl", records)
    else:
        pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
        source = CorpusSettings(path=str(tmp_path / "a.parquet"))
    corpus = load_corpus([source.model_copy(update={"on_bad_row": "reject"})])
    assert [row.golds for row in corpus.rows] == [("a", "b", "c"), ("one",)]
    assert [(r.reason, "'gold[1]'" in r.detail) for r in corpus.rejected] == [
        ("too long", False), ("empty", True),
    ]  # fmt: skip
    tldr = {"query": "q", "reference_responses": [" b", "c"]}
    (row,) = load_corpus([jsonl(tmp_path / "b.jsonl", [tldr])]).rows
    assert row.golds == ("b", "c")
    assert "a list of texts" in refusal(
        jsonl(tmp_path / "c.jsonl", [{"prompt": "p", "gold": ["a", 1]}])
    )


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": "\n\nHuman: How?", "rejected": ""},
        {"chosen": "How are you?", "rejected": ""},
        {"chosen": "\n\nHuman: How?\n\nAssistant: ", "rejected": ""},
        {"prompt": "p", "chosen": [{"role": "user", "content": "p"}]},
        {"question": "Q?", "context": "text", "answer": "yes"},
        {"query": "q", "reference_responses": []},
    ],
)
def test_a_broken_record_of_a_known_format_names_its_field(tmp_path: Path, record: Any) -> None:
    field = "context" if "context" in record else list(record)[-1]
    message = refusal(jsonl(tmp_path / "a.jsonl", [record]))
    assert ("'chosen" if "chosen" in record else repr(field)) in message


@pytest.mark.parametrize(
    ("name", "rows", "rejected"),
    [
        ("hh_harmless_base_test.jsonl.gz", 2302, {"empty", "duplicate", "wrong dialogue"}),
        ("ultrafeedback_eval_clean.jsonl", 200, set()),
        ("tldr_first300.csv", 300, set()),
        ("hotpotqa_train_100.json", 100, set()),
    ],
)
def test_the_real_corpora_are_read_and_every_row_accounted_for(
    corpora: Path, name: str, rows: int, rejected: set[str]
) -> None:
    corpus = load_corpus([CorpusSettings(path=str(corpora / name), on_bad_row="reject")])
    assert len(corpus.rows) == rows
    assert {r.reason for r in corpus.rejected} == rejected
    total = 2312 if rejected else rows
    assert len(corpus.rows) + len(corpus.rejected) == total
    assert all(r.gold.strip() and r.prompt[-1]["role"] == "user" for r in corpus.rows)


def test_a_row_that_is_too_long_is_left_out_and_the_next_ones_are_read(tmp_path: Path) -> None:
    long = b'{"prompt": "' + b"x" * 9_000_000 + b'"}'
    source = jsonl(tmp_path / "a.jsonl", [GOOD, long, *ROWS])
    corpus = load_corpus([source.model_copy(update={"on_bad_row": "reject"})])
    assert prompts(corpus.rows) == ["fine", *(r["prompt"] for r in ROWS)]
    assert [(r.source, r.reason) for r in corpus.rejected] == [("a.jsonl:2", "too long")]


def test_a_file_of_nothing_but_bad_rows_is_not_read_to_its_end(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["hello"] * 12_000)
    said = refusal(source.model_copy(update={"on_bad_row": "reject"}))
    assert "none of the first 10,000 rows can be used: this is not JSON" in said
    assert "reading stopped after 1,000 bad rows" in refusal(source)


def test_a_dialogue_keeps_all_its_turns(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hello."},
        {"from": "gpt", "value": "Hi."},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "Because."},
    ]
    for chat in (turns, json.dumps(turns), str(turns)):
        (row,) = load_corpus([jsonl(tmp_path / "a.jsonl", [{"conversations": chat}])]).rows
        assert [(m["role"], m["content"]) for m in row.prompt] == [
            ("system", "Be brief."),
            ("user", "Hello."),
            ("assistant", "Hi."),
            ("user", "Why?"),
        ]
        assert row.gold == "Because."


def test_a_dialogue_needs_no_answer_where_there_are_no_golds(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A"}]
    for turns in (chat, chat[:1]):
        path = jsonl(tmp_path / "a.jsonl", [{"messages": turns}]).path
        (row,) = load_corpus([CorpusSettings(path=path, gold_column="")]).rows
        assert (prompts([row]), row.gold) == (["Q?"], "")
