"""The rows that travel through the loop, and their Arrow schemas.

A prompt is one row; each stage adds columns and joins by `prompt_id`, never by position. What a
policy thought before it answered has columns of its own, as it was sampled, tags included; they are
empty for a policy that does not think. Every stage and the record import this module.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import operator
import types
import typing
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from models.judges.base import Verdict
from models.policy import Message

Row = TypeVar("Row")
NOT_BETTER = "not better"
"""Why a sound candidate is rejected whose y1 is as good; and the detail of a rejected prompt that
has only such candidates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """x and yG: what the user asks, and the reference response of the corpus."""

    prompt_id: str
    prompt: tuple[Message, ...]
    gold: str
    """The one that is shown, and learned by supervised fine-tuning."""
    source: str
    """Where the row came from: "prompts.jsonl:7"."""
    other_golds: tuple[str, ...] = ()
    """Further references: a response is as similar to the gold as to the nearest of all."""

    @property
    def golds(self) -> tuple[str, ...]:
        """All references of the prompt, the one that is shown first."""
        return (self.gold, *self.other_golds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One sampled (z, c, y2) of a prompt. `sample` is its number, 0 … N-1."""

    sample: int
    principle: str
    critique: str
    refined: str
    finish: str
    """"stop" when every part ended by itself, "length" when one was cut at its token limit."""
    tokens: int
    """Generated tokens of all parts, thoughts included."""
    principle_thoughts: str = ""
    critique_thoughts: str = ""
    refined_thoughts: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mined(Prompt):
    """+ y1 and its N candidates (E-step, proposals)."""

    initial: str
    initial_finish: str
    initial_tokens: int
    initial_thoughts: str = ""
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstAnswer(Prompt):
    """What is read of a mined prompt whose y1 no candidate improved: y1 alone."""

    initial: str
    initial_finish: str
    initial_thoughts: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateScore:
    """f(y2, yG) in [0, 1], or None with the reason why it could not be scored."""

    sample: int
    score: float | None
    unscored: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """f(y1, yG) in [0, 1], or None with the reason why it could not be scored; and its candidates'.

    The texts stay in `Mined`: at 16 candidates of 3,000 bytes they are 300 times as long.
    """

    prompt_id: str
    initial_score: float | None
    initial_unscored: str | None
    candidates: tuple[CandidateScore, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredCandidate(Candidate):
    """A candidate with its score."""

    score: float | None
    unscored: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored(Mined):
    """A mined prompt with its scores, as the filter reads it; on no disk."""

    initial_score: float | None
    initial_unscored: str | None
    candidates: tuple[ScoredCandidate, ...]

    @classmethod
    def of(cls, mined: Mined, scores: Scores) -> Scored:
        """The rows of one prompt joined.

        Raises:
            ValueError: they are of different prompts or candidates.
        """
        sampled = [candidate.sample for candidate in mined.candidates]
        if mined.prompt_id != scores.prompt_id or sampled != [c.sample for c in scores.candidates]:
            raise ValueError(f"the scores of {scores.prompt_id} are not of {mined.prompt_id}")
        candidates = tuple(
            ScoredCandidate(**fields(candidate), score=c.score, unscored=c.unscored)
            for candidate, c in zip(mined.candidates, scores.candidates, strict=True)
        )
        return cls(
            **fields(mined) | {"candidates": candidates},
            initial_score=scores.initial_score,
            initial_unscored=scores.initial_unscored,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory(Prompt):
    """A kept (x, y1, z, y2). Weights of one prompt's trajectories sum to 1."""

    sample: int
    initial: str
    principle: str
    refined: str
    initial_score: float
    score: float
    weight: float
    initial_thoughts: str = ""
    principle_thoughts: str = ""
    """They may quote the gold, which was in view: they are never trained on."""
    refined_thoughts: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A candidate that was not kept, or (sample None) a whole prompt of which none was."""

    prompt_id: str
    sample: int | None
    source: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled(Trajectory):
    """+ the principle that is trained on: the cluster's representative, or the original."""

    label: str
    cluster: int
    """Its principle's place in the constitution, from 0; beyond its end: of the tail."""
    replaced: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRow:
    """One distinct principle and where it went."""

    principle: str
    cluster: int
    """Its representative's place in the constitution, from 0; beyond its end: of the tail."""
    representative: str
    support: int
    """Trajectories that were kept with this principle."""
    inserted: int
    """Tokens that its refinements inserted; 0 where nothing was compared by them."""
    x: float | None
    y: float | None
    """Place on the map, or None where there is none."""
    note: str
    """What was missing: "no insertion" (compared by its other features), "no vector" (alone)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One of a query's constitutions, and the policy's response under it (SAMI)."""

    identifiers: tuple[str, ...]
    """"pos ID" or "neg ID" of each principle or antithesis, in the order of the prompt."""
    principles: tuple[str, ...]
    """Their texts."""
    response: str
    finish: str
    tokens: int
    thoughts: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled(Prompt):
    """+ C constitutions and a response under each (SAMI, sampling)."""

    draws: tuple[Draw, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Response(Draw):
    """What one policy answers to one held-out prompt, under a constitution or (no principles)
    without.
    """

    prompt_id: str
    iteration: int
    arm: str
    """What kind of constitution it is: `tasks.sami.evaluate.ARMS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one policy answers to one held-out prompt without gold: y1, z, y2."""

    prompt_id: str
    iteration: int
    initial: str
    principle: str
    refined: str
    finish: str
    tokens: int
    initial_thoughts: str = ""
    principle_thoughts: str = ""
    refined_thoughts: str = ""
    initial_tokens: int = 0
    """Those of y1 among `tokens`."""
    keep: float | None = None
    """p(keep | x, y1), in [0, 1], of a policy that has learned to keep first answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DialogueAnswer(Answer):
    """+ its place in a benchmark's dialogue: `turn` is 1 or 2."""

    question_id: int
    turn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One judged pair of answers to one prompt. `outcome` is 1, ½ or 0; None: it failed."""

    prompt_id: str
    iteration: int
    answer: str
    """Which answer of this iteration's policy is compared: "refined" or "initial"; SAMI: that to
    which kind of constitution."""
    against: int
    """The iteration of the reference policy; -1: a model outside the experiment."""
    reference: str
    """Which answer of the reference policy it is, "refined" or "initial"; or that model's name."""
    judge: str
    ours: str
    theirs: str
    our_score: float | None
    their_score: float | None
    outcome: float | None
    failure: str | None
    asked: bool = True
    """Whether the judge was asked: what is missing, empty or the same text twice needs none."""
    verdicts: tuple[Verdict, ...] = ()
    """What the judge said in each order, where the order may matter."""


def prompt_id(prompt: Sequence[Message]) -> str:
    """sha256 (hex) of the normalised prompt: NFC, outer white space stripped, roles kept."""
    turns = [[m["role"], unicodedata.normalize("NFC", m["content"]).strip()] for m in prompt]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode()).hexdigest()


def fields(row: Any) -> dict[str, Any]:
    """A row's columns by name, nested rows kept: what a stage passes on and adds to."""
    return {name: getattr(row, name) for name in _columns(type(row))}


def schema(row_type: type) -> pa.Schema:
    """The Arrow schema of a row type, derived from its annotations."""
    return pa.schema([_field(name, hint) for name, hint in _columns(row_type).items()])


def to_table(rows: Iterable[Any], row_type: type) -> pa.Table:
    """Rows as an Arrow table with the type's schema (also when there are none)."""
    kept = list(rows)
    columns = [
        _array([getattr(row, name) for row in kept], hint)
        for name, hint in _columns(row_type).items()
    ]
    return pa.Table.from_arrays(columns, schema=schema(row_type))


def from_table(table: pa.Table, row_type: type[Row]) -> list[Row]:
    """The rows of an Arrow table, without the columns that the type lacks.

    Raises:
        TypeError: a column is missing that has no default.
    """
    hints = _columns(row_type)
    found = {n: table.column(n).combine_chunks() for n in table.column_names if n in hints}
    return _made(row_type, {n: _values(column, hints[n]) for n, column in found.items()})


def _hints(row_type: Any) -> dict[str, Any]:
    """Name → annotation, of a dataclass or a TypedDict."""
    hints = typing.get_type_hints(row_type)
    if dataclasses.is_dataclass(row_type):
        return {field.name: hints[field.name] for field in dataclasses.fields(row_type)}
    return hints


_columns: Callable[[Any], dict[str, Any]] = functools.cache(_hints)  # they take longest


def _field(name: str, hint: Any) -> pa.Field:
    return pa.field(name, _arrow(_present(hint)), nullable=isinstance(hint, types.UnionType))


def _present(hint: Any) -> Any:
    """The annotation without None."""
    if isinstance(hint, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def _arrow(hint: Any) -> pa.DataType:
    scalars = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    if hint in scalars:
        return scalars[hint]
    if typing.get_origin(hint) in (tuple, Sequence):
        return pa.list_(pa.field("item", _arrow(typing.get_args(hint)[0]), nullable=False))
    return pa.struct([_field(name, inner) for name, inner in _columns(hint).items()])


def _array(values: Sequence[Any], hint: Any) -> pa.Array:
    """Values of one annotation; column by column, which is several times as fast as row by row."""
    kind = _arrow(_present(hint))
    if pa.types.is_list(kind):
        offsets = pa.array(itertools.accumulate(map(len, values), initial=0), pa.int32())
        items = _array([item for some in values for item in some], typing.get_args(hint)[0])
        return pa.ListArray.from_arrays(offsets, items, type=kind)
    if pa.types.is_struct(kind):
        get = getattr if dataclasses.is_dataclass(hint) else operator.getitem
        columns = [
            _array([get(value, name) for value in values], inner)
            for name, inner in _columns(hint).items()
        ]
        return pa.StructArray.from_arrays(columns, fields=list(kind))
    return pa.array(values, kind)


def _values(array: pa.Array, hint: Any) -> list[Any]:
    """The values of a column, as `_array` took them."""
    if pa.types.is_list(array.type):
        items = iter(_values(array.flatten(), typing.get_args(hint)[0]))
        return [
            tuple(itertools.islice(items, length)) for length in array.value_lengths().to_pylist()
        ]
    if pa.types.is_struct(array.type):
        hints, names = _columns(hint), [field.name for field in array.type]
        parts = zip(names, array.flatten(), strict=True)
        return _made(hint, {n: _values(part, hints[n]) for n, part in parts if n in hints})
    found: list[Any] = array.to_pylist()
    return found


def _made(kind: Any, columns: dict[str, list[Any]]) -> list[Any]:
    names = tuple(columns)
    return [
        kind(**dict(zip(names, row, strict=True))) for row in zip(*columns.values(), strict=True)
    ]
