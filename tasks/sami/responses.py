"""Response files of SAMI's reference implementation: read, and paired by key.

A file holds what one policy answered, `{"constitution": {KEY: text}, "question": {…}, "response":
{…}}`. `flows.commands.judge` has two of them judged under their constitutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from constitutions.errors import UserError, UserErrors
from constitutions.parse import parse_json, read_text
from models.chat_template import fold_system
from models.policy import Message
from tasks.judging.pairs import OUTSIDE, AnswerPair
from tasks.policies.answers import Given
from tasks.rows import Comparison, Prompt, Rejected, fields, prompt_id

COLUMNS = ("constitution", "question", "response")
FORM = 'a JSON object {"constitution": {KEY: text}, "question": {…}, "response": {…}}'
REPORTED = 20
"""Mistakes that an error names; the rest are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseRow:
    """What a policy answered to a question under a constitution; `key` is the row's name."""

    key: str
    question: str
    constitution: str
    response: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseFile:
    """One policy's rows, in the order of the file; their keys differ."""

    path: Path
    rows: tuple[ResponseRow, ...]


class ResponsePairs(NamedTuple):
    """The pairs of two files, and the rows that are in none."""

    pairs: list[AnswerPair]
    rows: dict[str, ResponseRow]
    """Our row of every pair, by its `prompt_id`."""
    rejected: list[Rejected]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedRow(Comparison):
    """+ the key, question and constitution of its rows in the two files."""

    key: str
    question: str
    constitution: str


# Files --------------------------------------------------------------------------------------


def read_responses(path: Path) -> ResponseFile:
    """The rows of a response file; further columns are ignored.

    Raises:
        UserError: there is no such file, it is no JSON of this form, or it has no row.
        UserErrors: everything that is wrong with its columns and values, each with its key.
    """
    columns = _columns(path)
    if problems := list(_problems(path, columns)):
        raise UserErrors(problems[:REPORTED], more=max(len(problems) - REPORTED, 0))
    keys = columns["response"]
    if not keys:
        raise UserError("there are no rows", where=str(path), expected="at least one response")
    rows = (ResponseRow(key=k, **{name: columns[name][k] for name in COLUMNS}) for k in keys)
    return ResponseFile(path=path, rows=tuple(rows))


def _columns(path: Path) -> dict[str, dict[str, Any]]:
    found = parse_json(read_text(path, expected="a response file"), str(path), expected=FORM)
    if not isinstance(found, dict):
        raise UserError(f"this is a JSON {_kind(found)}", where=str(path), expected=FORM)
    if wrong := [name for name in COLUMNS if not isinstance(found.get(name), dict)]:
        listed = ", ".join(list(found)[:10]) or "nothing"
        missing = f"the column is missing (there is {listed})"
        raise UserErrors(
            [
                UserError(
                    f"the column is of type {_kind(found[name])}" if name in found else missing,
                    where=f"{path}, column '{name}'",
                    expected=FORM,
                )
                for name in wrong
            ]
        )
    return {name: found[name] for name in COLUMNS}


def _problems(path: Path, columns: Mapping[str, Mapping[str, Any]]) -> Iterator[UserError]:
    """Keys that a column lacks, then values that are no texts."""
    for key in dict.fromkeys(key for column in columns.values() for key in column):
        if lacking := [name for name, column in columns.items() if key not in column]:
            yield UserError(
                f"there is no {' and no '.join(lacking)}",
                where=f"{path}, key '{key}'",
                expected="the same keys in all three columns",
            )
    for name, column in columns.items():
        may_be_empty = name == "response"
        for key, value in column.items():
            if problem := _value_problem(value, may_be_empty=may_be_empty):
                yield UserError(
                    problem,
                    where=f"{path}, column '{name}', key '{key}'",
                    expected="a text" if may_be_empty else "a text that is not empty",
                )


def _value_problem(value: Any, *, may_be_empty: bool) -> str:
    if not isinstance(value, str):
        return f"the value is of type {_kind(value)}"
    if not value.strip() and not may_be_empty:
        return "the text is empty"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"half a character (a lone surrogate) at place {error.start}"
    return ""


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


# Pairs --------------------------------------------------------------------------------------


def response_pairs_of(ours: ResponseFile, theirs: ResponseFile) -> ResponsePairs:
    """A pair for every key that both files have, under the constitution as its principle.

    Rows are joined by key, never by position, and must be the same question under the same
    constitution. The same question under two constitutions has two values of `prompt_id`.
    A row that only one side has, or that repeats a question under its constitution, is rejected.

    Raises:
        UserErrors: a key stands for two questions or constitutions.
        UserError: no key is in both files.
    """
    other = {row.key: row for row in theirs.rows}
    both = [(row, other[row.key]) for row in ours.rows if row.key in other]
    if not both:
        raise UserError(
            "the two files have no key in common",
            where=f"{ours.path} and {theirs.path}",
            expected="responses of two policies to the same questions",
        )
    problems = [p for a, b in both for p in _differences(ours.path, theirs.path, a, b)]
    if problems:
        raise UserErrors(problems[:REPORTED], more=max(len(problems) - REPORTED, 0))
    found = ResponsePairs([], {}, [])
    for a, b in both:
        pair = _pair(ours.path, theirs.path, a, b)
        first = found.rows.setdefault(pair.prompt.prompt_id, a)
        if first is a:
            found.pairs.append(pair)
        else:
            earlier = f"the same question and constitution as key '{first.key}'"
            found.rejected.append(_rejected(ours.path, a, "duplicate", earlier))
    for file, counterpart in ((ours, theirs), (theirs, ours)):
        keys = {row.key for row in counterpart.rows}
        for row in file.rows:
            if row.key not in keys:
                absent = f"{counterpart.path} has no key '{row.key}'"
                found.rejected.append(_rejected(file.path, row, "no counterpart", absent))
    return found


def with_constitution(pair: AnswerPair) -> AnswerPair:
    """The pair with its constitution in the user's turn, for a judge that reads no principle.

    Not in a system turn: many templates have none, and some drop it without an error.
    """
    system = Message(role="system", content=pair.principle)
    asked = tuple(fold_system((system, *pair.prompt.prompt)))
    return replace(pair, prompt=replace(pair.prompt, prompt=asked))


def judged_rows(paired: ResponsePairs, rows: Sequence[Comparison]) -> list[JudgedRow]:
    """Comparisons with the key, question and constitution of their pairs."""
    asked = [paired.rows[row.prompt_id] for row in rows]
    return [
        JudgedRow(**fields(row), key=a.key, question=a.question, constitution=a.constitution)
        for row, a in zip(rows, asked, strict=True)
    ]


def _differences(
    our_path: Path, their_path: Path, ours: ResponseRow, theirs: ResponseRow
) -> Iterator[UserError]:
    for name in ("question", "constitution"):
        a, b = getattr(ours, name), getattr(theirs, name)
        if a != b:
            place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
            at = min(len(a), len(b)) if place is None else place
            yield UserError(
                f"the {name} is another one in {their_path}: {_around(a, at)!r}, there "
                f"{_around(b, at)!r}",
                where=f"{our_path}, key '{ours.key}'",
                expected="two policies' responses to the same questions and constitutions",
            )


def _around(text: str, place: int) -> str:
    return text[max(place - 10, 0) : place + 30]


def _prompt(path: Path, row: ResponseRow) -> Prompt:
    asked = Message(role="user", content=row.question)
    system = Message(role="system", content=row.constitution)
    return Prompt(
        prompt_id=prompt_id((system, asked)),
        prompt=(asked,),
        gold="",
        source=f"{path.name}:{row.key}",
    )


def _pair(our_path: Path, their_path: Path, ours: ResponseRow, theirs: ResponseRow) -> AnswerPair:
    return AnswerPair(
        iteration=0,
        answer="initial",
        against=OUTSIDE,
        reference=their_path.name,
        prompt=_prompt(our_path, ours),
        ours=Given(text=ours.response),
        theirs=Given(text=theirs.response),
        principle=ours.constitution,
    )


def _rejected(path: Path, row: ResponseRow, reason: str, detail: str) -> Rejected:
    prompt = _prompt(path, row)
    return Rejected(
        prompt_id=prompt.prompt_id, sample=None, source=prompt.source, reason=reason, detail=detail
    )
