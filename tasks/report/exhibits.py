"""What the report shows of the texts themselves: refinements with their insertions marked, a map.

Everything here comes from rows that the stages wrote; the examples are chosen by a stated rule,
never by how good they look. The texts are a model's: whoever shows them escapes them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from typing import Literal, NamedTuple

from constitutions.constitution import principle_key
from models.policy import Message
from tasks.benchmarks.rows import spread
from tasks.rows import Answer, ClusterRow, Comparison, Labelled, Prompt, Trajectory

Kind = Literal["same", "added", "removed", "gap"]

LONGEST = 3_000
"""Words and marks of a text that are compared and shown; the rest is a gap."""
EXAMPLE_CONTEXT = 10
"""Words and marks that an example on the map keeps beside each change."""
MAP_POINTS = 400
"""Dots on a map at most, the best supported."""
MAP_WIDTH, MAP_HEIGHT, MAP_MARGIN = 1000, 620, 40


class Piece(NamedTuple):
    """A stretch of a text that was changed into another; "gap": left out, to be brief."""

    kind: Kind
    text: str


class Change(NamedTuple):
    """A text and what it became, each in pieces."""

    before: list[Piece]
    after: list[Piece]


def change(before: str, after: str) -> Change:
    """Two texts, with what the second removed from the first and what it added."""
    pieces = word_diff(before, after)
    return Change(
        [piece for piece in pieces if piece.kind != "added"],
        [piece for piece in pieces if piece.kind != "removed"],
    )


def word_diff(before: str, after: str, context: int | None = None) -> list[Piece]:
    """The difference of two texts, word by word: what stayed, was added or was removed.

    White space is never a change; where it differs, the longer one is shown.

    Args:
        context: words to keep on each side of a change, of what stayed; None keeps all.
    """
    old, new = _words(before), _words(after)
    cut = len(old) > LONGEST or len(new) > LONGEST
    old, new = old[:LONGEST], new[:LONGEST]
    match = SequenceMatcher(None, _bare(old), _bare(new), autojunk=False)
    pieces: list[Piece] = []
    for what, a, b, c, d in match.get_opcodes():
        if what == "equal":
            stayed = [max(pair, key=len) for pair in zip(old[a:b], new[c:d], strict=True)]
            first, last = a == c == 0, b == len(old) and d == len(new)
            pieces += _same(stayed, context, first, last)
            continue
        pieces += [Piece("removed", "".join(old[a:b]))] if a < b else []
        pieces += [Piece("added", "".join(new[c:d]))] if c < d else []
    return [*pieces, Piece("gap", " … ")] if cut else pieces


def _words(text: str) -> list[str]:
    """Words and single marks, each with the white space that follows it."""
    return re.findall(r"^\s+|(?:\w+|[^\w\s])\s*", text)


def _bare(words: Iterable[str]) -> list[str]:
    return [word.strip() for word in words]


def _same(words: Sequence[str], context: int | None, first: bool, last: bool) -> list[Piece]:
    """What stayed; its middle (or its outer end, at an end of the text) is left out when long."""
    left, right = (0 if first else context or 0), (0 if last else context or 0)
    if context is None or len(words) <= left + right + context:
        return [Piece("same", "".join(words))]
    kept = (words[:left], words[len(words) - right :])
    return [
        *([Piece("same", "".join(kept[0]))] if left else []),
        Piece("gap", " … "),
        *([Piece("same", "".join(kept[1]))] if right else []),
    ]


# Before and after -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerExhibit:
    """One held-out prompt with what it was answered before and after, and what the judge said."""

    number: int
    """Its place among the held-out prompts by id, from 1."""
    prompt: tuple[Message, ...]
    source: str
    principle: str
    change: Change
    outcome: str
    """ "win", "tie", "loss" or "not judged"; against the initial policy's first answer."""
    failure: str


def examples(
    answers: Sequence[Answer],
    comparisons: Iterable[Comparison],
    prompts: Iterable[Prompt],
    final: Literal["refined", "initial"] = "refined",
    count: int = 10,
) -> list[AnswerExhibit]:
    """Answers evenly spaced over all held-out prompts in the order of their ids, which are hashes.

    Neither the answers nor the judgements influence the choice.

    Args:
        final: "refined" shows y1 → z → y2; "initial" (of a policy that was tuned on golds) the
            initial policy's answer → y1.
    """
    asked = {p.prompt_id: p for p in prompts}
    judged: dict[str, Comparison] = {}
    for row in comparisons:
        if (row.against, row.answer, row.reference) == (0, final, "initial"):
            judged.setdefault(row.prompt_id, row)  # of several judges, the first
    ordered = sorted(answers, key=lambda a: a.prompt_id)
    return [
        _example(number, row, asked[row.prompt_id], judged.get(row.prompt_id), final)
        for number, row in spread(list(enumerate(ordered, start=1)), count)
    ]


def _example(
    number: int, row: Answer, asked: Prompt, judged: Comparison | None, final: str
) -> AnswerExhibit:
    tuned = judged if final == "initial" else None
    return AnswerExhibit(
        number=number,
        prompt=asked.prompt,
        source=asked.source,
        principle="" if tuned else row.principle,
        change=change(tuned.theirs, tuned.ours) if tuned else change(row.initial, row.refined),
        outcome=outcome_word(judged.outcome if judged else None),
        failure=(judged.failure or "") if judged else "there is no comparison",
    )


def outcome_word(outcome: float | None) -> str:
    """ "win", "tie" or "loss"; between them the figure; None was not judged."""
    words = {1.0: "win", 0.5: "tie", 0.0: "loss"}
    return "not judged" if outcome is None else words.get(outcome, f"{outcome:.2f}")


# The map ----------------------------------------------------------------------------------------


class Dot(NamedTuple):
    """A principle on the map, in its units; `radius` grows with the root of its support."""

    x: float
    y: float
    radius: float
    row: ClusterRow
    in_tail: bool
    """Whether it is outside of the constitution, and keeps its own words."""


class Mark(NamedTuple):
    """A cluster's number (from 1), where its representative stands."""

    x: float
    y: float
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """The principles of one iteration in the plane."""

    iteration: int
    dots: list[Dot]
    marks: list[Mark]
    clusters: list[tuple[int, str, int]]
    """(number, representative, trajectories of all its members), numbered like the constitution's
    principles."""
    tail: tuple[int, int]
    """Principles outside of the constitution, and their trajectories."""
    distinct: int
    """Principles in all; those without a place, or beyond `MAP_POINTS`, have no dot."""
    examples: Mapping[str, list[Piece]]
    """Principle → the refinement that it improved most."""


def principle_map(
    iteration: int, rows: Sequence[ClusterRow], kept: Iterable[Labelled], size: int
) -> Map:
    """The map of an iteration's clustering, scaled to `MAP_WIDTH` by `MAP_HEIGHT`, y downwards.

    Args:
        size: principles of the constitution; clusters beyond it are the tail, without numbers.
    """
    placed = [row for row in rows if row.x is not None and row.y is not None]
    placed = sorted(placed, key=lambda row: (-row.support, row.principle))[:MAP_POINTS]
    dots = sorted(_dots(placed, size), key=lambda dot: (dot.row.cluster, -dot.row.support))
    best = best_examples(kept)
    return Map(
        iteration=iteration,
        dots=dots,
        marks=[
            Mark(dot.x, dot.y - dot.radius - 7, dot.row.cluster + 1)
            for dot in dots
            if dot.row.principle == dot.row.representative and not dot.in_tail
        ],
        clusters=_clusters([row for row in rows if row.cluster < size]),
        tail=(
            sum(row.cluster >= size for row in rows),
            sum(row.support for row in rows if row.cluster >= size),
        ),
        distinct=len(rows),
        examples={
            dot.row.principle: word_diff(row.initial, row.refined, EXAMPLE_CONTEXT)
            for dot in dots
            if (row := best.get(principle_key(dot.row.principle)))
        },
    )


def best_examples(kept: Iterable[Trajectory]) -> dict[str, Trajectory]:
    """Principle (its key) → the trajectory with it whose score rose most, the first by id."""
    best: dict[str, Trajectory] = {}
    for row in sorted(kept, key=lambda r: (r.initial_score - r.score, r.prompt_id, r.sample)):
        best.setdefault(principle_key(row.principle), row)
    return best


def _dots(rows: Sequence[ClusterRow], size: int) -> list[Dot]:
    places = [(row.x or 0.0, row.y or 0.0) for row in rows]
    xs, ys = _onto([x for x, _ in places], MAP_WIDTH), _onto([-y for _, y in places], MAP_HEIGHT)
    return [
        Dot(round(x, 1), round(y, 1), _radius(row.support), row, row.cluster >= size)
        for x, y, row in zip(xs, ys, rows, strict=True)
    ]


def _radius(support: int) -> float:
    return round(min(5 + 3 * math.sqrt(support), 26), 1)


def _onto(values: Sequence[float], length: int) -> list[float]:
    """Values spread from margin to margin; in the middle, where they are all one."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if high == low:
        return [length / 2] * len(values)
    scale = (length - 2 * MAP_MARGIN) / (high - low)
    return [MAP_MARGIN + (value - low) * scale for value in values]


def _clusters(rows: Sequence[ClusterRow]) -> list[tuple[int, str, int]]:
    ordered = sorted(rows, key=lambda row: row.cluster)
    groups = [list(group) for _, group in groupby(ordered, key=lambda row: row.cluster)]
    return [(g[0].cluster + 1, g[0].representative, sum(r.support for r in g)) for g in groups]
