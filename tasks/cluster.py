"""Posterior regularisation: a small set of principles replaces all that were sampled.

`cluster` de-duplicates the kept principles, compares them by what they say and what they do, merges
them by average linkage, and labels every trajectory with its cluster's representative (STaPLe,
section "posterior regularisation"; the posterior p · exp(-λ·1[z ∉ Z̃])). The parts that need no
policy or settings are in `tasks.clustering`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from constitutions.constitution import Constitution, Principle, diff, principle_key, save
from models import prompts
from models.embedders import Embed, sentence_embedder
from models.policy import Policy
from models.settings import Settings
from tasks.clustering import features as blocks
from tasks.clustering.agglomeration import group, members_of, representatives
from tasks.clustering.features import Distinct, Features, distinct_principles
from tasks.clustering.insertions import Insertions, Proposals, insertions, nothing_inserted
from tasks.clustering.picture import figure, map_principles
from tasks.clustering.support import measured, tail_of
from tasks.clustering.threshold import Describe, predictive_threshold
from tasks.clustering.wordings import with_wordings
from tasks.policies.base import noted_embedder
from tasks.policies.opening import PolicySource
from tasks.record.record import Attempt
from tasks.record.slot import Slot
from tasks.record.stage import stage
from tasks.record.work import Metrics, Workspace
from tasks.rows import ClusterRow, Labelled, Mined, Trajectory, fields

Feature = Literal["effect", "characters", "sentences", "hidden"]


LISTED = 10
"""Wordings of a principle that the constitution's file lists; all are in the table `clusters`."""
THRESHOLD = 0.8
"""The distance threshold; also where too few principles are there to choose one."""


class ClusterSettings(Settings):
    """How principles are condensed into a constitution."""

    features: tuple[Feature, ...] = Field(default=("effect", "characters"), min_length=1)
    """What principles are compared by: what their refinements insert, their wording's characters, a
    sentence embedding of it, the policy's hidden states. Several count equally."""
    distance_threshold: Annotated[float, Field(gt=0, le=2)] | Literal["predictive"] = THRESHOLD
    """Clusters merge while their mean pairwise cosine distance is at most this; higher = fewer.
    "predictive": the largest one whose clusters predict the words that refinements insert as well
    as any does; it suits every kind of features."""
    max_principles: int | None = Field(default=None, ge=1)
    """Go on merging, beyond the threshold, until at most this many clusters are left."""
    constitution_size: int | None = Field(default=None, ge=1)
    """Principles at most: of the clusters with the most trajectories. The trajectories of all other
    clusters, the tail, keep their own principles as labels. Unset: each cluster has its principle.
    """
    min_prompts: Annotated[int, Field(ge=1, le=1_000_000, exclude_if=lambda count: count == 1)] = 1
    """A principle of the constitution was kept on at least so many prompts; rarer ones are left to
    the tail. One that holds for a single prompt may have been kept by accident."""
    tail: Annotated[Literal["keep", "drop"], Field(exclude_if=lambda fate: fate == "keep")] = "keep"
    """Whether the tail's trajectories are trained on, too, or dropped."""
    carried: Annotated[int, Field(ge=0, le=100, exclude_if=lambda count: not count)] = 0
    """For how many iterations without a trajectory a principle of the constitution before stays in
    this one, until a review drops it; and one that is rare is not left to the tail. 0: for none."""
    representative: Literal["medoid", "mode", "none"] = "medoid"
    """Which member labels a cluster: the most central, the most frequent; "none" replaces no label
    (unconstrained STaPLe)."""
    logprob_tolerance: float | None = Field(default=None, ge=0)
    """Nats of log p(y2 | x, y1, z) that a label's replacement may cost (λ); beyond, the original
    stays. Unset: no test."""
    embedding_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """The model behind the feature "sentences": a directory, a hub name, or "all-minilm-l6-v2", the
    packaged one that `staple fetch` keeps."""
    picture: Literal["umap", "svd", "none"] = "umap"
    """How the map of principles is drawn; it has no influence on the clusters."""

    @property
    def needs_policy(self) -> bool:
        """Whether the policy itself is asked: for its hidden states or its log-probabilities."""
        return "hidden" in self.features or self.logprob_tolerance is not None


@stage("cluster")
def cluster_stage(
    at: Slot,
    settings: ClusterSettings,
    policy: PolicySource,
    trajectories: Attempt,
    mined: Attempt,
    earlier: Mapping[str, Attempt],
) -> Attempt:
    """trajectories, all candidates, earlier constitutions → labelled, constitution, map."""

    def compute(work: Workspace) -> Metrics:
        asked = policy.load() if settings.needs_policy else None
        known = [with_wordings(attempt) for attempt in earlier.values()]
        done = cluster(
            trajectories.read("trajectories", Trajectory),
            mined.rows("mined", Proposals),
            settings,
            policy=asked,
            before=known[-1] if known else None,
            templates=policy.templates,
            seed=at.seed,
            experiment=at.record.experiment,
            iteration=at.iteration,
        )
        work.write("labelled", done.labelled, Labelled)
        work.write("clusters", done.clusters, ClusterRow)
        save(done.constitution, work.outputs / "constitution.yaml")
        figure(done.clusters, work.outputs / "map.png", len(done.constitution.principles))
        return {
            **{f"cluster/{name}": float(count) for name, count in done.counts.items()},
            "cluster/distance_threshold": done.threshold,
            "constitution_size": float(len(done.constitution.principles)),
            "coverage": done.constitution.coverage,
            "discovery_rate": discovery_rate(done.labelled, known),
        }

    inputs = policy.inputs(trajectories=trajectories, mined=mined, **earlier)
    noted = policy.noted(at)
    if not settings.needs_policy:
        noted = replace(noted, device="cpu", uses=at.uses)
    elif policy.settings.device != "cuda":
        noted = noted.using(threads=str(policy.settings.threads or "cores"))
    if "sentences" in settings.features:
        noted = noted_embedder(noted, settings.embedding_model)
    return noted.attempt("cluster", settings, inputs, compute)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clustering:
    """What the stage makes. `counts` are the numbers that its report shows; `threshold` is the
    distance threshold, as it was set or found."""

    labelled: list[Labelled]
    constitution: Constitution
    clusters: list[ClusterRow]
    counts: dict[str, int]
    threshold: float


@dataclass(frozen=True, slots=True)
class _Group:
    """A cluster's principles, and the one that labels it."""

    representative: Distinct
    members: tuple[Distinct, ...]
    in_tail: bool = False


def cluster(
    trajectories: Sequence[Trajectory],
    mined: Sequence[Mined | Proposals],
    settings: ClusterSettings,
    *,
    policy: Policy | None = None,
    before: Constitution | None = None,
    templates: prompts.Templates = prompts.CHAT,
    embed: Embed | None = None,
    seed: int = 0,
    experiment: str = "",
    iteration: int = 0,
) -> Clustering:
    """Label every trajectory with a principle of a condensed constitution.

    Args:
        trajectories: what the filter kept; the result has the same rows in the same order.
        mined: all sampled candidates, read once, where "effect" is among the features or the
            threshold is "predictive".
        policy: for the feature "hidden" and for the log-probability test.
        before: the constitution of the iteration before, with all wordings, to carry over from.
        templates: the policy's prompts, for the log-probability test.
        embed: texts to unit vectors; by default the settings' embedding model.
        seed: of the reduction of large feature blocks, and of the map.

    Raises:
        UserError: the embedding model is missing.
        ValueError: the settings need a policy and none was given.
    """
    distinct = distinct_principles(trajectories)
    inserted = nothing_inserted(len(distinct))
    threshold = settings.distance_threshold
    if settings.representative == "none" or not distinct:
        features, numbers = None, np.arange(len(distinct))
    else:
        if "effect" in settings.features or threshold == "predictive":
            inserted = insertions(distinct, mined)
        describe = _describer([d.text for d in distinct], settings, policy, embed, seed)
        if threshold == "predictive":
            threshold = predictive_threshold(describe, inserted, seed) or THRESHOLD
        features = describe(np.arange(len(distinct)), inserted.counts)
        numbers = group(features, threshold, settings.max_principles)
    chosen = representatives(distinct, numbers, features, settings.representative)
    groups = [
        _Group(distinct[one], tuple(distinct[i] for i in members))
        for one, members in zip(chosen, members_of(numbers), strict=True)
    ]
    held = carried_over(before, groups, settings.carried) if before and settings.carried else None
    groups = _bounded(groups, trajectories, settings, held)
    labelled = _labelled(trajectories, groups, settings, policy, templates)
    tail = [row for row in labelled if groups[row.cluster].in_tail]
    if settings.tail == "drop":
        labelled, tail = [row for row in labelled if not groups[row.cluster].in_tail], []
    constitution = Constitution(
        experiment=experiment,
        iteration=iteration,
        tail=tail_of(tail, sum(row.weight for row in labelled)),
        principles=(*_principles(labelled, groups), *(held.absent if held else ())),
    )
    rest = [g.representative.text for g in sorted(groups, key=_rank) if g.in_tail]
    place = {text: number for number, text in enumerate((*constitution.texts, *rest))}
    places = [place[g.representative.text] for g in groups]
    labelled = [replace(row, cluster=places[row.cluster]) for row in labelled]
    points = (
        map_principles(features, settings.picture, seed)
        if features
        else np.full((len(distinct), 2), math.nan)
    )
    notes = _notes(inserted, features, settings)
    rows = [
        ClusterRow(
            principle=d.text,
            cluster=places[number],
            representative=groups[number].representative.text,
            support=d.support,
            inserted=int(total),
            x=None if math.isnan(x) else float(x),
            y=None if math.isnan(y) else float(y),
            note=note,
        )
        for d, number, total, (x, y), note in zip(
            distinct, map(int, numbers), inserted.totals, points, notes, strict=True
        )
    ]
    rows.sort(key=lambda row: (row.cluster, -row.support, row.principle))
    return Clustering(
        labelled=labelled,
        constitution=constitution,
        clusters=rows,
        counts=_counts(labelled, rows, constitution)
        | ({"dropped": len(trajectories) - len(labelled)} if settings.tail == "drop" else {})
        | ({"carried": len(held.absent)} if held else {}),
        threshold=THRESHOLD if threshold == "predictive" else threshold,
    )


def discovery_rate(labelled: Sequence[Labelled], earlier: Sequence[Constitution]) -> float:
    """Share of the trajectories, in [0, 1], whose label no earlier constitution holds.

    The paper's principle discovery rate; 0.0 where there is no trajectory. A label is known under
    any wording that an earlier principle took in: which of them is the medoid changes from
    iteration to iteration, and is no discovery.
    """
    known = {
        principle_key(text)
        for constitution in earlier
        for principle in constitution.principles
        for text in (principle.text, *principle.members)
    }
    unseen = sum(principle_key(row.label) not in known for row in labelled)
    return unseen / len(labelled) if labelled else 0.0


class CarriedOver(NamedTuple):
    """What becomes of the principles of the constitution before."""

    present: frozenset[str]
    """The texts of this iteration's clusters that continue one."""
    absent: tuple[Principle, ...]
    """Those that no cluster continues, and that stay nevertheless."""


def carried_over(before: Constitution, groups: Sequence[_Group], most: int) -> CarriedOver:
    """Which principles of the constitution before go on, and how.

    Args:
        before: with all wordings.
        most: for how many iterations in a row a principle may stay without a trajectory.
    """
    here = Constitution(
        principles=tuple(
            Principle(text=g.representative.text, members=tuple(m.text for m in g.members))
            for g in groups
        )
    )
    changes = diff(before, here)
    return CarriedOver(
        present=frozenset(here.texts) - {p.text for p in changes.added},
        absent=tuple(
            p.model_copy(update={"support": 0, "share": 0.0, "absent": p.absent + 1})
            for p in changes.dropped
            if p.absent < most
        ),
    )


def _bounded(
    groups: Sequence[_Group],
    trajectories: Sequence[Trajectory],
    settings: ClusterSettings,
    held: CarriedOver | None,
) -> list[_Group]:
    """The groups in their order. In the tail are all but the `constitution_size` with the most
    trajectories, and those of fewer than `min_prompts` prompts, unless they continue a principle of
    before."""
    helped = defaultdict[str, set[str]](set)
    for row in trajectories:
        helped[principle_key(row.principle)].add(row.prompt_id)
    often = [
        g
        for g in groups
        if len(set[str]().union(*(helped[m.key] for m in g.members))) >= settings.min_prompts
    ]
    kept = set(map(_rank, sorted(often, key=_rank)[: settings.constitution_size]))
    present = held.present if held else ()
    return [
        replace(g, in_tail=_rank(g) not in kept and g.representative.text not in present)
        for g in groups
    ]


def _rank(group: _Group) -> tuple[int, str]:
    return -sum(m.support for m in group.members), group.representative.text


def _describer(
    texts: Sequence[str],
    settings: ClusterSettings,
    policy: Policy | None,
    embed: Embed | None,
    seed: int,
) -> Describe:
    """The settings' feature blocks of principles, side by side.

    Texts are embedded, and large blocks of them reduced, once.
    """

    def block(feature: Feature) -> Any:
        match feature:
            case "characters":
                return blocks.character_features(texts)
            case "sentences":
                return (embed or sentence_embedder(settings.embedding_model))(texts)
            case "hidden":
                return blocks.centred(_needed(policy, "hidden").hidden_states(texts))

    worded = {
        feature: blocks.block_features(block(feature), seed)
        for feature in settings.features
        if feature != "effect"
    }

    def describe(rows: np.ndarray, counts: Any) -> Features:
        return blocks.combine(
            [
                worded[feature].only(rows)
                if feature in worded
                else blocks.block_features(blocks.effect_features(counts), seed)
                for feature in settings.features
            ]
        )

    return describe


def _needed(policy: Policy | None, setting: str) -> Policy:
    if policy is None:
        raise ValueError(f"'{setting}' needs a policy, and none was given")
    return policy


def _labelled(
    trajectories: Sequence[Trajectory],
    groups: Sequence[_Group],
    settings: ClusterSettings,
    policy: Policy | None,
    templates: prompts.Templates,
) -> list[Labelled]:
    """Each trajectory with its group's number and its label."""
    group_of = {d.key: number for number, g in enumerate(groups) for d in g.members}
    numbers = [group_of[principle_key(row.principle)] for row in trajectories]
    labels = [
        row.principle if groups[number].in_tail else groups[number].representative.text
        for row, number in zip(trajectories, numbers, strict=True)
    ]
    if settings.representative == "none":
        labels = [row.principle for row in trajectories]
    elif settings.logprob_tolerance is not None:
        asked, tolerance = _needed(policy, "logprob_tolerance"), settings.logprob_tolerance
        labels = tested_labels(trajectories, labels, asked, templates, tolerance)
    return [
        Labelled(**fields(row), label=label, cluster=number, replaced=label != row.principle)
        for row, label, number in zip(trajectories, labels, numbers, strict=True)
    ]


def tested_labels(
    trajectories: Sequence[Trajectory],
    labels: Sequence[str],
    policy: Policy,
    templates: prompts.Templates,
    tolerance: float,
) -> list[str]:
    """The labels, but the original principle where the label makes y2 too improbable.

    A label stays where log p(y2 | x, y1, label) ≥ log p(y2 | x, y1, principle) - tolerance (nats).
    """
    replaced = [i for i, row in enumerate(trajectories) if labels[i] != row.principle]
    rows = [trajectories[i] for i in replaced]
    before = _refinement_logprobs(policy, templates, rows, [row.principle for row in rows])
    after = _refinement_logprobs(policy, templates, rows, [labels[i] for i in replaced])
    tested = list(labels)
    for i, original, changed in zip(replaced, before, after, strict=True):
        if not changed >= original - tolerance:
            tested[i] = trajectories[i].principle
    return tested


def _refinement_logprobs(
    policy: Policy,
    templates: prompts.Templates,
    rows: Sequence[Trajectory],
    principles: Sequence[str],
) -> list[float]:
    """log p(y2 | x, y1, z) of each row under the principle given for it, in nats."""
    pairs = [
        (prompts.ask_refinement(templates, row.prompt, row.initial, z), row.refined)
        for row, z in zip(rows, principles, strict=True)
    ]
    return [scoring.logprob for scoring in policy.logprobs(pairs)] if pairs else []


def _principles(labelled: Sequence[Labelled], groups: Sequence[_Group]) -> tuple[Principle, ...]:
    """Each group's principle but the tail's, with the figures of the trajectories it labels."""
    carried: defaultdict[int, list[Labelled]] = defaultdict(list)
    for row in labelled:
        if principle_key(row.label) == groups[row.cluster].representative.key:
            carried[row.cluster].append(row)
    weight = sum(row.weight for row in labelled)
    found = []
    for number, g in enumerate(groups):
        if g.in_tail:
            continue
        principle = Principle(
            text=g.representative.text, wordings=len(g.members), members=_listed(g)
        )
        found.append(measured(principle, carried[number], weight))
    return tuple(found)


def _listed(group: _Group) -> tuple[str, ...]:
    """The representative and the most frequent of a group's wordings, most frequent first."""
    ranked = sorted(group.members, key=lambda m: (-m.support, m.text))
    others = [m for m in ranked if m is not group.representative]
    listed = {m.key for m in (group.representative, *others[: LISTED - 1])}
    return tuple(m.text for m in ranked if m.key in listed)


def _notes(inserted: Insertions, features: Features | None, settings: ClusterSettings) -> list[str]:
    """What each distinct principle lacks: `ClusterRow.note`."""
    if features is None:
        return [""] * len(inserted.totals)
    without = "no insertion" if "effect" in settings.features else ""
    return [
        "no vector" if not present else "" if total else without
        for total, present in zip(inserted.totals, features.present, strict=True)
    ]


def _counts(
    labelled: Sequence[Labelled], rows: Sequence[ClusterRow], constitution: Constitution
) -> dict[str, int]:
    texts = {principle_key(text) for text in constitution.texts}
    tail = constitution.tail.support if constitution.tail else 0
    outside = sum(principle_key(row.label) not in texts for row in labelled)
    return {
        "trajectories": len(labelled),
        "distinct": len(rows),
        "principles": len(constitution.principles),
        "replaced": sum(row.replaced for row in labelled),
        "kept_outside": outside - tail,
        "tail": tail,
        "no_insertion": sum(row.note == "no insertion" for row in rows),
        "no_vector": sum(row.note == "no vector" for row in rows),
    }
