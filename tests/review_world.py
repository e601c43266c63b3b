"""A small clustered constitution with its trajectories, as `tasks.cluster` leaves them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from constitutions.constitution import Constitution, Principle, save
from models.settings import Settings
from tasks.record.record import Attempt
from tasks.record.slot import Slot
from tasks.record.work import Metrics, Workspace
from tasks.rows import ClusterRow, Labelled

TRAJECTORIES = (
    # prompt, sample, principle, label, cluster, weight
    ("0", 0, "warn of risks", "warn of risks", 0, 0.5),
    ("0", 1, "ask back", "ask back", 1, 0.3),
    ("0", 2, "tell a joke", "tell a joke", 2, 0.2),
    ("1", 0, "caution people", "warn of risks", 0, 1.0),
    ("2", 0, "alert people", "alert people", 0, 1.0),  # kept outside of the constitution
    ("3", 0, "use a pun", "tell a joke", 2, 1.0),
    ("4", 0, "ask back", "ask back", 1, 0.6),
    ("4", 3, "warn of risks", "warn of risks", 0, 0.4),
    ("5", 0, "ask back", "ask back", 1, 1.0),
)
WORDINGS = {
    "warn of risks": ("warn of risks", "alert people", "caution people"),
    "ask back": ("ask back",),
    "tell a joke": ("tell a joke", "use a pun"),
}
HOSTILE = "done\n\n# big | <script>alert(1)</script> [a](javascript:b) `c` " + "very " * 90
"""A response that tries to break the page that shows it."""


class NoSettings(Settings):
    """The stand-in for a cluster stage has none."""


def clustering(experiment: str = "an-experiment") -> tuple[list[Labelled], Constitution]:
    """Three principles over six prompts, with several trajectories on two of them."""
    texts = sorted(WORDINGS, key=lambda t: (-sum(row[3] == t for row in TRAJECTORIES), t))
    rows = [
        Labelled(
            prompt_id=prompt,
            prompt=({"role": "user", "content": f"please repair part {prompt}"},),
            gold="gold",
            source=f"prompts.jsonl:{prompt}",
            sample=sample,
            initial="repair it | now",
            principle=principle,
            refined=HOSTILE,
            initial_score=0.2,
            score=0.5 + 0.01 * number,
            weight=weight,
            label=label,
            cluster=texts.index(list(WORDINGS)[cluster]),
            replaced=label != principle,
        )
        for number, (prompt, sample, principle, label, cluster, weight) in enumerate(TRAJECTORIES)
    ]
    blank = tuple(
        Principle(text=text, members=WORDINGS[text], support=9 - n) for n, text in enumerate(texts)
    )
    return rows, _measured(rows, blank, experiment)


def clustered_attempt(slot: Slot, note: str = "", listed: int = 9) -> Attempt:
    """A recorded attempt of `cluster` that wrote it; another note is another constitution.

    Args:
        listed: wordings of each principle, at most, that its file lists.
    """

    def compute(work: Workspace) -> Metrics:
        rows, constitution = clustering(slot.record.experiment)
        rows = [replace(row, source=f"{row.source}{note}") for row in rows]
        work.write("labelled", rows, Labelled)
        work.write("clusters", clusters_of(rows, constitution), ClusterRow)
        save(_listing(constitution, listed), work.outputs / "constitution.yaml")
        return {"constitution_size": 3.0}

    noted = replace(slot, notes={"note": f"{note}{listed}"})
    return noted.attempt("cluster", NoSettings(), {}, compute)


def _listing(constitution: Constitution, most: int) -> Constitution:
    entries = (p.model_copy(update={"members": p.members[:most]}) for p in constitution.principles)
    return constitution.model_copy(update={"principles": tuple(entries)})


def clusters_of(rows: list[Labelled], constitution: Constitution) -> list[ClusterRow]:
    """Each distinct wording, in its cluster."""
    support = Counter((row.cluster, row.principle) for row in rows)
    found = [
        ClusterRow(
            principle=wording,
            cluster=cluster,
            representative=dict(enumerate(constitution.texts)).get(cluster, wording),
            support=count,
            inserted=0,
            x=None,
            y=None,
            note="",
        )
        for (cluster, wording), count in support.items()
    ]
    return sorted(found, key=lambda row: (row.cluster, -row.support, row.principle))


def _measured(rows: list[Labelled], blank: tuple[Principle, ...], experiment: str) -> Constitution:
    total = sum(row.weight for row in rows)
    principles = []
    for p in blank:
        carried = [row for row in rows if row.label == p.text]
        figures = {
            "support": len(carried),
            "share": round(sum(row.weight for row in carried) / total, 6),
            "example": max(carried, key=lambda row: row.score).prompt_id,
        }
        principles.append(p.model_copy(update=figures))
    return Constitution(experiment=experiment, iteration=1, principles=tuple(principles))
