"""What refinements insert: for each principle the words that y2 has and y1 lacks."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from constitutions.constitution import principle_key
from models.policy import Progress
from models.pools.processes import ProcessPool
from tasks.clustering.features import Distinct
from tasks.record.work import shards
from tasks.rows import Mined

SHARD = 64
"""Prompts that a process counts at once."""
PENDING = 4_000_000
"""Counts that are kept before equal cells are added up: some 50 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """The columns of a candidate that `insertions` reads."""

    principle: str
    refined: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposals:
    """The columns of a mined prompt that `insertions` reads."""

    initial: str
    candidates: tuple[Proposal, ...]


@dataclass(frozen=True, slots=True)
class Insertions:
    """How often the refinements of each principle inserted each word.

    `counts`: (principles, words) float32, at least one column; `words`: those of its columns.
    """

    counts: Any
    words: tuple[str, ...]

    @property
    def totals(self) -> np.ndarray:
        """Words that each principle's refinements inserted, (principles,) int."""
        return np.asarray(self.counts.sum(axis=1)).ravel().astype(int)


def insertions(distinct: Sequence[Distinct], mined: Sequence[Mined | Proposals]) -> Insertions:
    """What each principle's refinements inserted, over all candidates sampled with it.

    Several processes count where there are many prompts; the result is the same.

    Returns:
        The rows in the order of `distinct`, the words sorted.
    """
    places = {d.key: place for place, d in enumerate(distinct)}
    parts = dict(enumerate(shards(mined, SHARD)))
    with ProcessPool(partial(_opened, places)) as pool:
        done = pool.map(_counted, parts, lambda _: None)
        return _sum((counted for shard in done for counted in shard.rows), len(distinct))


def nothing_inserted(principles: int) -> Insertions:
    """Where insertions count for nothing."""
    return _sum((), principles)


def inserted_tokens(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """The tokens that `after` counts more often than `before`, and how many more."""
    have = before.get
    return {token: more for token, n in after.items() if (more := n - have(token, 0)) > 0}


def tokens(text: str) -> list[str]:
    """Lower-case words, single marks, and single characters of scripts without spaces."""
    return _TOKEN.findall(text.lower())


_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f"
"""Kana, Han and Thai."""
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


def _opened(places: Mapping[str, int], _: object) -> Mapping[str, int]:
    """What a process counts by: the place of each principle, by its key."""
    return places


def _counted(
    places: Mapping[str, int], rows: Sequence[Mined | Proposals], tick: Progress
) -> list[Insertions]:
    """What the rows' refinements insert; a cell may occur several times."""
    columns: dict[str, int] = {}
    at, said, times = array("i"), array("i"), array("f")
    for row in rows:
        asked = [(places.get(principle_key(c.principle)), c.refined) for c in row.candidates]
        kept = [(place, refined) for place, refined in asked if place is not None]
        before = Counter(tokens(row.initial)) if kept else Counter[str]()
        for place, refined in kept:
            found = inserted_tokens(before, Counter(tokens(refined)))
            at.extend([place] * len(found))
            said.extend([columns.setdefault(word, len(columns)) for word in found])
            times.extend(found.values())
    tick(len(rows))
    return [Insertions(_cells(at, said, times, (len(places), len(columns))), tuple(columns))]


def _sum(parts: Iterable[Insertions], principles: int) -> Insertions:
    """All parts as one, whatever their order."""
    from scipy.sparse import csr_matrix

    columns: dict[str, int] = {}
    pending, size = list[Any](), 0
    for part in parts:
        known = np.array([columns.setdefault(w, len(columns)) for w in part.words], dtype=np.int32)
        counts = part.counts
        pending.append((counts.row, known[counts.col], counts.data))
        size += counts.nnz
        if size > PENDING:
            added = _added(pending, (principles, len(columns)))
            pending, size = [(added.row, added.col, added.data)], 0
    counts = csr_matrix(_added(pending, (principles, max(len(columns), 1))))
    order = sorted(columns)
    counts = counts[:, [columns[word] for word in order]] if order else counts
    counts.sort_indices()
    return Insertions(counts, tuple(order))


def _added(pending: Sequence[Any], shape: tuple[int, int]) -> Any:
    """The cells of all pieces, equal ones added up."""
    empty = np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)
    rows, columns, data = (np.concatenate(each) for each in zip(empty, *pending, strict=True))
    cells = _cells(rows, columns, data, shape)
    cells.sum_duplicates()
    return cells


def _cells(rows: Any, columns: Any, data: Any, shape: tuple[int, int]) -> Any:
    from scipy.sparse import coo_matrix

    return coo_matrix((data, (rows, columns)), shape=shape)
