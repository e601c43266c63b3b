"""Response files of SAMI's reference implementation, read, paired and written as they are.

A file holds what one policy answered, `{"constitution": {KEY: text}, "question": {…}, "response":
{…}}`. `flows.commands.judge` has two of them judged under their constitutions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from constitutions.errors import UserError, UserErrors
from constitutions.parse import parse_json, read_text
from models.chat_template import fold_system
from models.files import write_text
from models.policy import Message
from tasks.judging.pairs import OUTSIDE, AnswerPair
from tasks.policies.answers import Given
from tasks.rows import Comparison, Prompt, Rejected, fields, prompt_id

COLUMNS = ("constitution", "question", "response")
"""In the order in which the reference writes them."""
ANY_TEXT = frozenset({"response"})
"""A response may be empty; a question or a constitution may not."""
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
    """+ the row of the two files that it is."""

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
    problems = [*_differing_keys(path, columns), *_bad_values(path, columns)]
    if problems:
        raise UserErrors(problems[:REPORTED], more=max(len(problems) - REPORTED, 0))
    keys = columns["response"]
    if not keys:
        raise UserError("there are no rows", where=str(path), expected="at least one response")
    rows = (ResponseRow(key=k, **{name: columns[name][k] for name in COLUMNS}) for k in keys)
    return ResponseFile(path=path, rows=tuple(rows))


def write_responses(path: Path, rows: Sequence[ResponseRow]) -> None:
    """Write rows as the reference does, to the byte; whole or not at all.

    Raises:
        ValueError: two rows have the same key.
    """
    columns = {name: {row.key: getattr(row, name) for row in rows} for name in COLUMNS}
    if any(len(column) != len(rows) for column in columns.values()):
        raise ValueError("two rows have the same key")
    write_text(path, json.dumps(columns, indent=4))


def _columns(path: Path) -> dict[str, dict[str, Any]]:
    text = read_text(path, expected="a response file")
    found = parse_json(text, str(path), expected=FORM)
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise UserError(f"this is a JSON {kind}", where=str(path), expected=FORM)
    problems = [_column_problem(path, name, found) for name in COLUMNS]
    if any(problems):
        raise UserErrors([p for p in problems if p])
    return {name: found[name] for name in COLUMNS}


def _column_problem(path: Path, name: str, found: dict[str, Any]) -> UserError | None:
    if name not in found:
        listed = ", ".join(list(found)[:10]) or "nothing"
        return UserError(
            f"the column is missing (there is {listed})",
            where=f"{path}, column '{name}'",
            expected=FORM,
        )
    if not isinstance(found[name], dict):
        kind = _kind(found[name])
        return UserError(
            f"the column is of type {kind}",
            where=f"{path}, column '{name}'",
            expected="an object from keys to texts",
        )
    return None


def _differing_keys(path: Path, columns: dict[str, dict[str, Any]]) -> Iterator[UserError]:
    for key in dict.fromkeys(key for name in COLUMNS for key in columns[name]):
        lacking = [name for name in COLUMNS if key not in columns[name]]
        if lacking:
            yield UserError(
                f"there is no {' and no '.join(lacking)}",
                where=f"{path}, key '{key}'",
                expected="the same keys in all three columns",
            )


def _bad_values(path: Path, columns: dict[str, dict[str, Any]]) -> Iterator[UserError]:
    for name in COLUMNS:
        for key, value in columns[name].items():
            expected = "a text" if name in ANY_TEXT else "a text that is not empty"
            if bad := _value_problem(value, may_be_empty=name in ANY_TEXT):
                where = f"{path}, column '{name}', key '{key}'"
                yield UserError(bad, where=where, expected=expected)


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
    constitution. A question may occur under several constitutions: `prompt_id` tells them apart.
    A row that only one side has, or that repeats a question under its constitution, is rejected.

    Raises:
        UserErrors: a key stands for two questions or constitutions.
        UserError: no key is in both files.
    """
    other = {row.key: row for row in theirs.rows}
    pairs = [(row, other[row.key]) for row in ours.rows if row.key in other]
    if not pairs:
        raise UserError(
            "the two files have no key in common",
            where=f"{ours.path} and {theirs.path}",
            expected="responses of two policies to the same questions",
        )
    problems = [p for a, b in pairs for p in _differences(ours.path, theirs.path, a, b)]
    if problems:
        raise UserErrors(problems[:REPORTED], more=max(len(problems) - REPORTED, 0))
    pairs_found: list[AnswerPair] = []
    rows: dict[str, ResponseRow] = {}
    rejected: list[Rejected] = []
    for a, b in pairs:
        pair = _pair(ours.path, theirs.path, a, b)
        first = rows.setdefault(pair.prompt.prompt_id, a)
        if first is a:
            pairs_found.append(pair)
        else:
            earlier = f"the same question and constitution as key '{first.key}'"
            rejected.append(_rejected(ours.path, a, "duplicate", earlier))
    for file, known in ((ours, other), (theirs, {row.key for row in ours.rows})):
        absent = (theirs if file is ours else ours).path
        rejected += [
            _rejected(file.path, row, "no counterpart", f"{absent} has no key '{row.key}'")
            for row in file.rows
            if row.key not in known
        ]
    return ResponsePairs(pairs_found, rows, rejected)


def with_constitution(pair: AnswerPair) -> AnswerPair:
    """The pair with its constitution in the request, for a judge that reads no principle.

    In the user's turn: many templates have no system turn, and some drop it without an error.
    """
    system = Message(role="system", content=pair.principle)
    asked = tuple(fold_system((system, *pair.prompt.prompt)))
    return replace(pair, prompt=replace(pair.prompt, prompt=asked))


def judged_rows(paired: ResponsePairs, rows: Sequence[Comparison]) -> list[JudgedRow]:
    """Comparisons with the key, question and constitution of their pairs."""
    return [_judged(paired.rows[row.prompt_id], row) for row in rows]


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


def _judged(asked: ResponseRow, row: Comparison) -> JudgedRow:
    return JudgedRow(
        **fields(row), key=asked.key, question=asked.question, constitution=asked.constitution
    )
