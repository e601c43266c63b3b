"""Posterior regularisation: a small set of principles takes the place of all that were sampled.

`cluster` de-duplicates the kept principles, embeds them by what they say and what they do, merges
them by average linkage, and labels every trajectory with its cluster's representative (STaPLe,
section "posterior regularisation"; the posterior p · exp(-λ·1[z ∉ Z̃])).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from constitutions.constitution import Constitution, Principle, load, principle_key, save
from models import embedders, prompts
from models.embedders import Embed, Features
from models.engine.threads import pinned
from models.policy import Policy
from models.settings import Settings
from tasks.policies.opening import PolicySource
from tasks.record.stage import stage
from tasks.record.store import Attempt, Slot
from tasks.record.work import Metrics, Workspace
from tasks.rows import Labelled, Scored, Trajectory

Feature = Literal["effect", "characters", "sentences", "hidden"]


class ClusterSettings(Settings):
    """How principles are condensed into a constitution."""

    features: tuple[Feature, ...] = Field(default=("effect", "characters"), min_length=1)
    """What principles are compared by: what their refinements insert, their wording's characters, a
    sentence embedding of it, the policy's hidden states. Several count equally."""
    distance_threshold: float = Field(default=0.8, gt=0, le=2)
    """Clusters merge while their mean pairwise cosine distance is at most this; higher = fewer."""
    max_principles: int | None = Field(default=None, ge=1)
    """Go on merging, beyond the threshold, until at most this many clusters are left."""
    representative: Literal["medoid", "mode", "none"] = "medoid"
    """Which member labels a cluster: the most central, the most frequent; "none" replaces no label
    (unconstrained STaPLe)."""
    logprob_tolerance: float | None = Field(default=None, ge=0)
    """Nats of log p(y2 | x, y1, z) that a label's replacement may cost (λ); beyond, the original
    stays. Unset: no test."""
    embedding_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Directory or hub name of the model behind the feature "sentences"."""
    picture: Literal["umap", "svd", "none"] = "umap"
    """How the map of principles is drawn; it has no influence on the clusters."""

    @property
    def needs_policy(self) -> bool:
        """Whether the policy itself is asked: for its hidden states or its log-probabilities."""
        return "hidden" in self.features or self.logprob_tolerance is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRow:
    """One distinct principle and where it went."""

    principle: str
    cluster: int
    """Its representative's place in the constitution, from 0."""
    representative: str
    support: int
    """Trajectories that were kept with this principle."""
    inserted: int
    """Tokens that its refinements inserted; 0 where effect was not asked for."""
    x: float | None
    y: float | None
    """Place on the map, or None where there is none."""
    note: str
    """What was missing: "no insertion" (compared by its other features), "no vector" (alone)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clustering:
    """What the stage makes. `counts` are the numbers that its report shows."""

    labelled: list[Labelled]
    constitution: Constitution
    clusters: list[ClusterRow]
    counts: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distinct:
    """All spellings of one principle: the most frequent text, and how often it was kept."""

    key: str
    text: str
    support: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """The clusters that hold items `left` and `right` become one, at this mean cosine distance."""

    left: int
    right: int
    distance: float


def cluster(
    trajectories: Sequence[Trajectory],
    scored: Iterable[Scored],
    settings: ClusterSettings,
    *,
    policy: Policy | None = None,
    templates: prompts.Templates = prompts.CHAT,
    embed: Embed | None = None,
    seed: int = 0,
    experiment: str = "",
    iteration: int = 0,
) -> Clustering:
    """Label every trajectory with a principle of a condensed constitution.

    Args:
        trajectories: what the filter kept; the answer has the same rows in the same order.
        scored: all sampled candidates, read once, where "effect" is among the features.
        policy: for the feature "hidden" and for the log-probability test.
        templates: the policy's prompts, for the log-probability test.
        embed: texts to unit vectors; by default the settings' embedding model.
        seed: of the reduction of large feature blocks, and of the map.

    Raises:
        UserError: the embedding model is missing.
        ValueError: the settings need a policy and none was given.
    """
    distinct = distinct_principles(trajectories)
    effects: Sequence[Counter[str]] = [Counter()] * len(distinct)
    if settings.representative == "none" or not distinct:
        features, groups = None, np.arange(len(distinct))
    else:
        if "effect" in settings.features:
            effects = insertions(distinct, scored)
        features = principle_features(distinct, effects, settings, policy, embed, seed)
        groups = group(features, settings.distance_threshold, settings.max_principles)
    chosen = representatives(distinct, groups, features, settings.representative)
    labelled = _relabel(trajectories, distinct, groups, chosen, settings, policy, templates)
    constitution, numbers = _constitution(labelled, distinct, groups, chosen, experiment, iteration)
    labelled = [_numbered(row, numbers) for row in labelled]
    places = map_principles(features, settings.picture, seed)
    rows = _rows(distinct, effects, features, groups, chosen, numbers, places, settings)
    return Clustering(
        labelled=labelled,
        constitution=constitution,
        clusters=rows,
        counts=_counts(labelled, rows, constitution),
    )


@stage("cluster")
def cluster_stage(
    at: Slot,
    settings: ClusterSettings,
    policy: PolicySource,
    trajectories: Attempt,
    scored: Attempt,
    earlier: Mapping[str, Attempt],
) -> Attempt:
    """trajectories, all scored candidates, earlier constitutions → labelled, constitution, map."""

    def compute(work: Workspace) -> Metrics:
        asked = policy.load() if settings.needs_policy else None
        done = cluster(
            trajectories.read("trajectories", Trajectory),
            scored.read("scored", Scored),
            settings,
            policy=asked,
            templates=policy.templates,
            seed=at.seed,
            experiment=at.record.experiment,
            iteration=at.iteration,
        )
        work.write("labelled", done.labelled, Labelled)
        work.write("clusters", done.clusters, ClusterRow)
        save(done.constitution, work.outputs / "constitution.yaml")
        figure(done.clusters, work.outputs / "map.png")
        known = [load(attempt.path("constitution.yaml")) for attempt in earlier.values()]
        return {
            **{f"cluster/{name}": float(count) for name, count in done.counts.items()},
            "constitution_size": float(len(done.constitution.principles)),
            "discovery_rate": discovery_rate(done.labelled, known),
        }

    inputs = policy.inputs(trajectories=trajectories, scored=scored, **earlier)
    noted = policy.noted(at)
    if not settings.needs_policy:
        noted = replace(noted, device="cpu")
    elif policy.settings.device != "cuda":
        threads = str(policy.settings.threads or "cores")
        noted = replace(noted, notes={**noted.notes, "threads": threads})
    return noted.attempt("cluster", settings, inputs, compute)


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


def distinct_principles(trajectories: Iterable[Trajectory]) -> list[Distinct]:
    """The kept principles without repetition (white space, case and final marks), by key."""
    spellings: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in trajectories:
        spellings[principle_key(row.principle)][" ".join(row.principle.split())] += 1
    return [
        Distinct(key=key, text=_most_frequent(texts), support=texts.total())
        for key, texts in sorted(spellings.items())
    ]


def insertions(distinct: Sequence[Distinct], scored: Iterable[Scored]) -> list[Counter[str]]:
    """For each principle the tokens in y2 and not in y1, over all candidates sampled with it."""
    effects: dict[str, Counter[str]] = {d.key: Counter() for d in distinct}
    for row in scored:
        before = embedders.tokens(row.initial)
        for candidate in row.candidates:
            effect = effects.get(principle_key(candidate.principle))
            if effect is not None:
                effect += embedders.inserted_tokens(before, embedders.tokens(candidate.refined))
    return list(effects.values())


def principle_features(
    distinct: Sequence[Distinct],
    effects: Sequence[Counter[str]],
    settings: ClusterSettings,
    policy: Policy | None = None,
    embed: Embed | None = None,
    seed: int = 0,
) -> Features:
    """The settings' feature blocks of each principle, side by side; see `embedders.combine`."""
    texts = [d.text for d in distinct]

    def block(feature: Feature) -> Any:
        match feature:
            case "effect":
                return embedders.effect_features(effects)
            case "characters":
                return embedders.character_features(texts)
            case "sentences":
                return (embed or embedders.sentence_embedder(settings.embedding_model))(texts)
            case "hidden":
                return embedders.centred(_needed(policy, "hidden").hidden_states(texts))

    return embedders.combine([block(feature) for feature in settings.features], seed)


@pinned()
def group(features: Features, threshold: float, at_most: int | None = None) -> np.ndarray:
    """Cluster numbers (n,), 0 … k-1 in order of first appearance.

    Average linkage on cosine distance up to `threshold`, and beyond it while more than `at_most`
    clusters are left. Rows without a vector stay alone, and do not count.
    """
    (placed,) = np.nonzero(features.present)
    limit = math.inf if at_most else threshold
    merges = sorted(agglomerate(features.vectors[placed], limit), key=lambda m: m.distance)
    surplus = len(placed) - at_most if at_most else 0
    parents = np.arange(len(features.present))
    for done, merge in enumerate(merges):
        if merge.distance > threshold and done >= surplus:
            break
        left, right = _root(parents, placed[merge.left]), _root(parents, placed[merge.right])
        parents[max(left, right)] = min(left, right)
    roots = [_root(parents, item) for item in range(len(parents))]
    return np.unique(roots, return_inverse=True)[1]


def agglomerate(vectors: np.ndarray, threshold: float = math.inf, block: int = 512) -> list[Merge]:
    """Exact average linkage on cosine distance, in O(n·d) memory.

    For unit vectors the mean pairwise cosine of two clusters is the dot product of their means, so
    no n-by-n matrix is kept. Average linkage is reducible (a merge brings no cluster nearer to a
    third than the nearer of its parts was), hence all pairs of reciprocal nearest neighbours can
    merge at once, a nearest neighbour that was not merged stays nearest, and a cluster whose
    nearest lies beyond the threshold is final.

    Args:
        vectors: (n, d) unit rows.
        threshold: the largest distance, in [0, 2], at which clusters still merge.
        block: rows whose distances to all others are computed together.

    Returns:
        At most n - 1 merges, parts before wholes.
    """
    means = np.array(vectors, dtype=np.float32)
    sizes = np.ones((len(means), 1), dtype=np.float32)
    nearest = np.zeros(len(means), dtype=np.intp)
    similarity = np.zeros(len(means), dtype=np.float32)
    alive = np.ones(len(means), dtype=bool)
    active = stale = np.arange(len(means))
    merges: list[Merge] = []
    while len(active) > 1:
        _find_nearest(means, active, stale, nearest, similarity, block)
        alive[active[1 - similarity[active] > threshold]] = False
        left, right = _reciprocal(np.flatnonzero(alive), nearest, similarity)
        merges += _as_merges(left, right, similarity)
        total = sizes[left] + sizes[right]
        means[left] = (sizes[left] * means[left] + sizes[right] * means[right]) / total
        sizes[left] = total
        alive[right] = False
        changed = ~alive
        changed[left] = True
        active = np.flatnonzero(alive)
        stale = active[changed[active] | changed[nearest[active]]]
    return merges


@pinned()
def representatives(
    distinct: Sequence[Distinct], groups: np.ndarray, features: Features | None, how: str
) -> list[int]:
    """The index of each group's representative among `distinct`, by group number.

    "medoid": the member with the smallest summed distance to the others, each counted as often as
    it was kept; "mode": the member that was kept most often. Ties go to the first by key.
    """
    support = np.array([d.support for d in distinct], dtype=np.float32)
    chosen = []
    for members in _members(groups):
        central = support[members]
        if how == "medoid" and features is not None:
            vectors = features.vectors[members]
            central = vectors @ (central @ vectors)
        chosen.append(int(members[np.argmax(central)]))
    return chosen


def map_principles(features: Features | None, how: str = "umap", seed: int = 0) -> np.ndarray:
    """Places in the plane for a picture: (n, 2), NaN for rows without a vector.

    UMAP (cosine) where asked for and where there are enough rows for it, else the two leading
    singular directions. "none" or no features: nothing but NaN, (0, 2) without features.
    """
    if features is None:
        return np.empty((0, 2))
    places = np.full((len(features.present), 2), np.nan)
    vectors = features.vectors[features.present]
    if how != "none" and len(vectors):
        large_enough = len(vectors) >= 5
        draw = _umap if how == "umap" and large_enough else _leading_directions
        places[features.present] = draw(vectors, seed)
    return places


def figure(rows: Sequence[ClusterRow], path: str | Path, labels: int = 20) -> None:
    """Draw the map as a PNG: a dot a principle, a colour a cluster, the largest clusters named."""
    from matplotlib.figure import Figure

    placed = [row for row in rows if row.x is not None]
    x, y = _points(placed).T
    canvas = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    axes = canvas.add_subplot()
    axes.scatter(
        x,
        y,
        s=[12 + 8 * math.sqrt(row.support) for row in placed],
        c=[row.cluster % 20 for row in placed],
        cmap="tab20",
        vmin=0,
        vmax=19,
        alpha=0.7,
        linewidths=0,
    )
    for number in range(labels):
        _name_cluster(axes, [row for row in placed if row.cluster == number])
    clusters = len({row.cluster for row in placed})
    axes.set_title(f"{len(placed):,} principles in {clusters:,} clusters")
    axes.set_axis_off()
    canvas.savefig(path)


def _most_frequent(texts: Counter[str]) -> str:
    return min(texts, key=lambda text: (-texts[text], text))


def _needed(policy: Policy | None, setting: str) -> Policy:
    if policy is None:
        raise ValueError(f"'{setting}' needs a policy, and none was given")
    return policy


def _root(parents: np.ndarray, item: int) -> int:
    while parents[item] != item:
        parents[item] = parents[parents[item]]
        item = parents[item]
    return int(item)


def _find_nearest(
    means: np.ndarray,
    active: np.ndarray,
    stale: np.ndarray,
    nearest: np.ndarray,
    similarity: np.ndarray,
    block: int,
) -> None:
    """Fill in the nearest other active cluster, and its similarity, of each stale one."""
    others = means[active].T
    for start in range(0, len(stale), block):
        rows = stale[start : start + block]
        cosines = means[rows] @ others
        cosines[np.arange(len(rows)), np.searchsorted(active, rows)] = -np.inf
        similarity[rows] = cosines.max(axis=1)
        equal = cosines == similarity[rows, None]
        nearest[rows] = active[equal.argmax(axis=1)]
        for i in np.flatnonzero(np.count_nonzero(equal, axis=1) > 1):
            nearest[rows[i]] = _preferred(rows[i], active[equal[i]])


def _preferred(row: int, tied: np.ndarray) -> int:
    """The tied neighbour that shares most leading bits with the row's number.

    The preference is mutual: equal distances pair off, where "the first" would have all clusters
    wait for one.
    """
    return int(tied[np.argmin(tied ^ row)])


def _reciprocal(
    active: np.ndarray, nearest: np.ndarray, similarity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of active clusters that are each other's nearest.

    Rounding may leave a ring of equal distances without such a pair: then the nearest pair.
    """
    partner = nearest[active]
    left = active[(nearest[partner] == active) & (active < partner)]
    if len(left) or not len(active):
        return left, nearest[left]
    best = active[[similarity[active].argmax()]]
    return np.minimum(best, nearest[best]), np.maximum(best, nearest[best])


def _as_merges(left: np.ndarray, right: np.ndarray, similarity: np.ndarray) -> list[Merge]:
    distances = 1 - np.maximum(similarity[left], similarity[right])
    return [
        Merge(left=int(a), right=int(b), distance=float(d))
        for a, b, d in zip(left, right, distances, strict=True)
    ]


def _members(groups: np.ndarray) -> list[np.ndarray]:
    """The items of each group, in order; the groups are numbered without a gap."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.cumsum(np.bincount(groups))[:-1]) if len(groups) else []


def _relabel(
    trajectories: Sequence[Trajectory],
    distinct: Sequence[Distinct],
    groups: np.ndarray,
    chosen: Sequence[int],
    settings: ClusterSettings,
    policy: Policy | None,
    templates: prompts.Templates,
) -> list[Labelled]:
    """Each trajectory with its group's number, and with its representative as far as that holds."""
    group_of = {d.key: int(g) for d, g in zip(distinct, groups, strict=True)}
    in_group = [group_of[principle_key(row.principle)] for row in trajectories]
    labels = [distinct[chosen[g]].text for g in in_group]
    if settings.representative == "none":
        labels = [row.principle for row in trajectories]
    elif settings.logprob_tolerance is not None:
        labels = tested_labels(
            trajectories,
            labels,
            _needed(policy, "logprob_tolerance"),
            templates,
            settings.logprob_tolerance,
        )
    return [
        Labelled(**_values(row), label=label, cluster=g, replaced=label != row.principle)
        for row, label, g in zip(trajectories, labels, in_group, strict=True)
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


def _constitution(
    labelled: Sequence[Labelled],
    distinct: Sequence[Distinct],
    groups: np.ndarray,
    chosen: Sequence[int],
    experiment: str,
    iteration: int,
) -> tuple[Constitution, dict[int, int]]:
    """The constitution, and each group's place in it."""
    carried: defaultdict[int, list[Labelled]] = defaultdict(list)
    for row in labelled:
        if principle_key(row.label) == distinct[chosen[row.cluster]].key:
            carried[row.cluster].append(row)
    weight = sum(row.weight for row in labelled)
    principles = [
        _principle(distinct[chosen[g]].text, carried[g], [distinct[i] for i in members], weight)
        for g, members in enumerate(_members(groups))
    ]
    constitution = Constitution(
        experiment=experiment, iteration=iteration, principles=tuple(principles)
    )
    places = {text: place for place, text in enumerate(constitution.texts)}
    return constitution, {g: places[p.text] for g, p in enumerate(principles)}


def _principle(
    text: str, rows: Sequence[Labelled], members: Sequence[Distinct], weight: float
) -> Principle:
    best = min(rows, key=lambda r: (r.initial_score - r.score, r.prompt_id, r.sample))
    return Principle(
        text=text,
        support=len(rows),
        share=round(min(sum(row.weight for row in rows) / weight, 1.0), 6),
        example=best.prompt_id,
        members=tuple(m.text for m in sorted(members, key=lambda m: (-m.support, m.text))),
    )


def _numbered(row: Labelled, numbers: Mapping[int, int]) -> Labelled:
    return Labelled(**_values(row) | {"cluster": numbers[row.cluster]})


def _values(row: Trajectory) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(row)}


def _rows(
    distinct: Sequence[Distinct],
    effects: Sequence[Counter[str]],
    features: Features | None,
    groups: np.ndarray,
    chosen: Sequence[int],
    numbers: Mapping[int, int],
    places: np.ndarray,
    settings: ClusterSettings,
) -> list[ClusterRow]:
    """One row a distinct principle, by cluster, then by support."""
    rows = []
    for i, principle in enumerate(distinct):
        x, y = places[i] if features is not None else (math.nan, math.nan)
        rows.append(
            ClusterRow(
                principle=principle.text,
                cluster=numbers[int(groups[i])],
                representative=distinct[chosen[groups[i]]].text,
                support=principle.support,
                inserted=effects[i].total(),
                x=None if math.isnan(x) else float(x),
                y=None if math.isnan(y) else float(y),
                note=_note(i, effects, features, settings),
            )
        )
    return sorted(rows, key=lambda row: (row.cluster, -row.support, row.principle))


def _note(
    i: int, effects: Sequence[Counter[str]], features: Features | None, settings: ClusterSettings
) -> str:
    if features is None:
        return ""
    if not features.present[i]:
        return "no vector"
    return "no insertion" if "effect" in settings.features and not effects[i] else ""


def _counts(
    labelled: Sequence[Labelled], rows: Sequence[ClusterRow], constitution: Constitution
) -> dict[str, int]:
    texts = {principle_key(text) for text in constitution.texts}
    return {
        "trajectories": len(labelled),
        "distinct": len(rows),
        "principles": len(constitution.principles),
        "replaced": sum(row.replaced for row in labelled),
        "kept_outside": sum(principle_key(row.label) not in texts for row in labelled),
        "no_insertion": sum(row.note == "no insertion" for row in rows),
        "no_vector": sum(row.note == "no vector" for row in rows),
    }


def _umap(vectors: np.ndarray, seed: int) -> np.ndarray:
    from umap import UMAP

    neighbours = min(15, len(vectors) - 1)
    mapper = UMAP(n_neighbors=neighbours, metric="cosine", random_state=seed, n_jobs=1)
    with pinned():
        return np.asarray(mapper.fit_transform(vectors))


@pinned()
def _leading_directions(vectors: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.decomposition import TruncatedSVD

    if min(vectors.shape) <= 2:
        return np.pad(vectors, ((0, 0), (0, 2)))[:, :2]
    return np.asarray(TruncatedSVD(2, random_state=seed).fit_transform(vectors - vectors.mean(0)))


def _name_cluster(axes: Any, rows: Sequence[ClusterRow]) -> None:
    if not rows:
        return
    x, y = np.median(_points(rows), axis=0)
    text = rows[0].representative
    short = text if len(text) <= 48 else text[:47] + "…"
    box = {"fc": "white", "alpha": 0.7, "lw": 0}
    above = {"xytext": (0, 9), "textcoords": "offset points"}
    axes.annotate(short, (x, y), ha="center", fontsize=8, bbox=box, **above)


def _points(rows: Sequence[ClusterRow]) -> np.ndarray:
    return np.array([(row.x, row.y) for row in rows], dtype=float).reshape(-1, 2)
