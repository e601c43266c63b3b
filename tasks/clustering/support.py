"""How much of the training set a principle labels: `cluster` and `review` measure it."""

from __future__ import annotations

from collections.abc import Sequence

from constitutions.constitution import Principle
from tasks.rows import Labelled


def measured(principle: Principle, rows: Sequence[Labelled], weight: float) -> Principle:
    """The principle with its support, share in [0, 1] and best example.

    Args:
        rows: the trajectories that it labels.
        weight: of all trajectories.
    """
    best = min(rows, key=lambda r: (r.initial_score - r.score, r.prompt_id, r.sample), default=None)
    figures = {
        "support": len(rows),
        "share": round(min(sum(row.weight for row in rows) / weight, 1.0), 6),
        "example": best.prompt_id if best else "",
    }
    return principle.model_copy(update=figures)
