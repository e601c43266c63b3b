"""How much of the training set a principle, or the tail, labels: for `cluster` and `review`."""

from __future__ import annotations

from collections.abc import Sequence

from constitutions.constitution import Principle, Tail, principle_key
from tasks.rows import Labelled


def measured(principle: Principle, rows: Sequence[Labelled], weight: float) -> Principle:
    """The principle with its support, share in [0, 1] and best example: the last one that it had,
    where it was carried over.

    Args:
        rows: the trajectories that it labels.
        weight: of all trajectories.
    """
    best = min(rows, key=lambda r: (r.initial_score - r.score, r.prompt_id, r.sample), default=None)
    figures = {
        "support": len(rows),
        "share": _share(rows, weight),
        "example": best.prompt_id if best else principle.example if principle.absent else "",
        "absent": 0 if rows else principle.absent,
    }
    return principle.model_copy(update=figures)


def tail_of(rows: Sequence[Labelled], weight: float) -> Tail | None:
    """The figures of the tail, whose trajectories `rows` are; None where there are none.

    Args:
        rows: the trajectories of no cluster of the constitution.
        weight: of all trajectories.
    """
    if not rows:
        return None
    distinct = {principle_key(row.label) for row in rows}
    return Tail(principles=len(distinct), support=len(rows), share=_share(rows, weight))


def _share(rows: Sequence[Labelled], weight: float) -> float:
    return round(min(sum(row.weight for row in rows) / weight, 1.0), 6)
