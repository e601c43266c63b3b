"""A person's review of the constitution before it is trained on; the labels follow.

`review` is optional (`review.enabled`) and stands between `cluster` and `train`. The decisions come
from `flows.review` (a form) or `flows.commands.edit` (an edited file); here they are applied and
recorded.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict

from constitutions.constitution import Constitution, Principle, diff, load, principle_key, save
from constitutions.errors import UserError
from constitutions.review import Decision, apply, described, effective
from models.files import write_text
from models.settings import Settings
from tasks.clustering.support import measured, tail_of
from tasks.clustering.wordings import TABLE
from tasks.record.record import Attempt, Record
from tasks.record.slot import Slot
from tasks.record.stage import stage
from tasks.record.work import Metrics, Workspace
from tasks.rows import ClusterRow, Labelled, Rejected

DROPPED = "principle dropped in review"
TAIL = ""
"""Where a trajectory of the tail stays, in place of a principle's id."""
BY, NOTE = "review.by", "review.note"
"""Tags of the attempt's MLflow run. Who decided changes no result, so it is in no digest."""


class ReviewSettings(Settings):
    """Whether a person reviews constitutions."""

    enabled: bool = False
    """The iteration waits after `cluster` until a person has approved its constitution."""
    which: Literal["each", "last"] = "each"
    """Every iteration's constitution, or the last one's alone."""


class ReviewDecision(BaseModel):
    """What a person decided on a constitution; nothing: approved as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    decisions: tuple[Decision, ...] = ()
    added: tuple[str, ...] = ()
    drop_tail: bool = False
    by: str = ""
    note: str = ""


@stage("review")
def review_stage(
    at: Slot, settings: ReviewSettings, clustered: Attempt, verdict: ReviewDecision
) -> Attempt:
    """labelled, clusters, constitution → as approved; the rejected trajectories, the decisions."""

    def compute(work: Workspace) -> Metrics:
        constitution = load(clustered.path("constitution.yaml"))
        clusters = clustered.read(TABLE, ClusterRow)
        done = review(clustered.read("labelled", Labelled), constitution, verdict, clusters)
        work.write("labelled", done.labelled, Labelled)
        work.write(TABLE, done.clusters, ClusterRow)
        work.write("rejected", done.rejected, Rejected)
        save(done.constitution, work.outputs / "constitution.yaml")
        _write_review(work.outputs / "review.yaml", constitution, done, verdict)
        return {
            **{f"review/{name}": float(count) for name, count in done.counts.items()},
            "constitution_size": float(len(done.constitution.principles)),
            "coverage": done.constitution.coverage,
        }

    who = {tag: text for tag, text in ((BY, verdict.by), (NOTE, verdict.note)) if text}
    noted = replace(at, notes={**at.notes, **_notes(verdict)}, tags={**at.tags, **who})
    attempt = noted.attempt("review", settings, {"clustered": clustered}, compute)
    if attempt.reused and not at.look:
        for tag, text in who.items():  # the same decisions again, perhaps by another person
            at.record.client.set_tag(attempt.run_id, tag, text)
    return attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Reviewed:
    """What the stage makes: rows in = labelled + rejected."""

    labelled: list[Labelled]
    rejected: list[Rejected]
    clusters: list[ClusterRow]
    """Those of what is left, with the numbers and the texts of the approved constitution."""
    constitution: Constitution
    counts: dict[str, int]


def review(
    labelled: Sequence[Labelled],
    constitution: Constitution,
    verdict: ReviewDecision,
    clusters: Iterable[ClusterRow] = (),
) -> Reviewed:
    """Apply a verdict to the constitution and to the trajectories that it labels.

    A label that is its principle's wording becomes the new wording; one that was kept outside of
    the constitution (the log-probability test, the tail) stays. A trajectory of the tail whose
    label is now the wording of a principle counts as that principle's. Every trajectory of a
    dropped principle's cluster, or of a dropped tail, is rejected. The weights of a prompt that
    loses some of its trajectories are scaled up to sum to 1 again: the posterior, given that the
    principle is one of those that were approved. A prompt that loses all of them is no longer
    trained on.

    Raises:
        UserError: a decision that cannot be followed (all of them at once); no trajectory left.
    """
    approved, places = apply(constitution, verdict.decisions, verdict.added)
    wordings = {p.id: p.text for p in approved.principles}
    worded = {principle_key(p.text): p.id for p in approved.principles}
    outside = None if verdict.drop_tail else TAIL

    def place_of(cluster: int, label: str) -> str | None:
        """The id of the principle, or `TAIL`, where it stays; None: it is dropped."""
        was = _principle_at(cluster, constitution)
        return places[was.id] if was else worded.get(principle_key(label), outside)

    ids: list[str] = []
    rows: list[Labelled] = []
    rejected: list[Rejected] = []
    for row in labelled:
        was, place = _principle_at(row.cluster, constitution), place_of(row.cluster, row.label)
        if place is None:
            rejected.append(_reject(row, was.text if was else f"the tail: {row.label}"))
        else:
            ids.append(place)
            rows.append(_relabelled(row, was, wordings[place]) if was else row)
    if not rows:
        raise UserError(
            "the review leaves no trajectory to train on",
            where=f"iteration {constitution.iteration}",
            expected="at least one principle with trajectories that stays",
        )
    rows = _reweighted(rows, {row.prompt_id for row in rejected})
    approved = _measured(approved, ids, rows)
    numbers = {p.id: number for number, p in enumerate(approved.principles)}
    shift = len(approved.principles) - len(constitution.principles)
    kept = ((row, place_of(row.cluster, row.principle)) for row in clusters)
    moved = [
        replace(row, cluster=row.cluster + shift)
        if id == TAIL
        else replace(row, cluster=numbers[id], representative=wordings[id])
        for row, id in kept
        if id is not None
    ]
    return Reviewed(
        labelled=[
            replace(row, cluster=row.cluster + shift if id == TAIL else numbers[id])
            for id, row in zip(ids, rows, strict=True)
        ],
        rejected=rejected,
        clusters=sorted(moved, key=lambda row: (row.cluster, -row.support, row.principle)),
        constitution=approved,
        counts=_counts(constitution, verdict, labelled, rows),
    )


def recorded_review(record: Record, iteration: int, clustered: Attempt) -> Attempt | None:
    """The newest review of this very constitution, if there is one."""
    for attempt in record.attempts("review", iteration):
        if attempt.inputs["clustered"].digest == clustered.digest:
            return attempt
    return None


def recorded_verdict(record: Record, iteration: int, clustered: Attempt) -> ReviewDecision | None:
    """The last decision on this very constitution; None: there is none yet."""
    reviewed = recorded_review(record, iteration, clustered)
    return read_verdict(reviewed) if reviewed else None


def read_verdict(reviewed: Attempt) -> ReviewDecision:
    """What was decided in a review attempt, by whom, and why."""
    recorded = yaml.safe_load(reviewed.path("review.yaml").read_text("utf-8"))
    tags = reviewed.record.reader.run(reviewed.run_id).tags
    return ReviewDecision(
        decisions=tuple(
            Decision(**{name: d[name] for name in Decision.model_fields if name in d})
            for d in recorded["decisions"]
        ),
        added=tuple(recorded["added"]),
        drop_tail=recorded.get("tail") == "dropped",
        by=tags.get(BY, ""),
        note=tags.get(NOTE, ""),
    )


def _notes(verdict: ReviewDecision) -> dict[str, str]:
    """What the outputs depend on: the decisions, not who took them."""
    decisions = [d.model_dump() for d in effective(verdict.decisions)]
    tail = {"drop_tail": True} if verdict.drop_tail else {}
    return {"decisions": json.dumps({"decisions": decisions, "added": verdict.added, **tail})}


def _write_review(
    path: Path, constitution: Constitution, done: Reviewed, verdict: ReviewDecision
) -> None:
    texts = {p.id: p.text for p in constitution.principles}
    document = {
        "changes": described(diff(constitution, done.constitution)) or ["approved as it is"],
        "counts": done.counts,
        "decisions": [
            {"principle": texts[d.id], **d.model_dump(exclude_defaults=True)}
            for d in effective(verdict.decisions)
        ],
        "added": list(verdict.added),
        **({"tail": "dropped"} if verdict.drop_tail else {}),
    }
    head = (
        f"# What a person decided about the constitution of iteration {constitution.iteration}.\n"
    )
    body = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)
    write_text(path, head + body)


def _principle_at(cluster: int, constitution: Constitution) -> Principle | None:
    """The principle of a cluster; None: it is of the tail."""
    return constitution.principles[cluster] if cluster < len(constitution.principles) else None


def _reject(row: Labelled, detail: str) -> Rejected:
    return Rejected(
        prompt_id=row.prompt_id,
        sample=row.sample,
        source=row.source,
        reason=DROPPED,
        detail=detail,
    )


def _relabelled(row: Labelled, was: Principle, wording: str) -> Labelled:
    if was.text == wording or principle_key(row.label) != principle_key(was.text):
        return row
    return replace(row, label=wording, replaced=wording != row.principle)


def _reweighted(rows: Sequence[Labelled], changed: Container[str]) -> list[Labelled]:
    """Rows of which those of a `changed` prompt sum to 1 again."""
    totals: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        totals[row.prompt_id] += row.weight
    return [
        replace(row, weight=row.weight / totals[row.prompt_id]) if row.prompt_id in changed else row
        for row in rows
    ]


def _measured(approved: Constitution, ids: Sequence[str], rows: Sequence[Labelled]) -> Constitution:
    """With the support, share and example of each principle that its trajectories give it now."""
    wordings = {p.id: principle_key(p.text) for p in approved.principles}
    carried: defaultdict[str, list[Labelled]] = defaultdict(list)
    for id, row in zip(ids, rows, strict=True):
        if id != TAIL and principle_key(row.label) == wordings[id]:
            carried[id].append(row)
    weight = sum(row.weight for row in rows)
    return Constitution(
        experiment=approved.experiment,
        iteration=approved.iteration,
        tail=tail_of([row for id, row in zip(ids, rows, strict=True) if id == TAIL], weight),
        principles=tuple(measured(p, carried[p.id], weight) for p in approved.principles),
    )


def _counts(
    constitution: Constitution,
    verdict: ReviewDecision,
    before: Sequence[Labelled],
    after: Sequence[Labelled],
) -> dict[str, int]:
    actions = Counter(d.action for d in effective(verdict.decisions))
    prompts = {row.prompt_id for row in before} - {row.prompt_id for row in after}
    return {
        "approved": len(constitution.principles) - actions.total(),
        "reworded": actions["reword"],
        "merged": actions["merge"],
        "dropped": actions["drop"],
        "added": len(verdict.added),
        **({"tail_dropped": int(verdict.drop_tail)} if constitution.tail else {}),
        "trajectories": len(after),
        "rejected": len(before) - len(after),
        "prompts_lost": len(prompts),
    }
