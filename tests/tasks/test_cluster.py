"""Clustering: paraphrases meet by what they do, and every trajectory keeps exactly one label."""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.manifold import trustworthiness
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

from constitutions.constitution import Constitution, Principle, load, principle_key, save
from models.policy import FINGERPRINT, Completion, Message, PolicySettings, Scoring
from models.prompts import TERSE, ask_refinement
from models.settings import Settings
from tasks.cluster import (
    LISTED,
    Clustering,
    ClusterSettings,
    cluster,
    cluster_stage,
    discovery_rate,
)
from tasks.clustering import agglomeration, picture
from tasks.clustering import features as blocks
from tasks.clustering import insertions as counting
from tasks.clustering.agglomeration import agglomerate, group, micro_clusters, representatives
from tasks.clustering.features import Features, block_features, distinct_principles
from tasks.clustering.insertions import insertions, tokens
from tasks.clustering.picture import figure, map_principles
from tasks.clustering.wordings import with_wordings
from tasks.policies.opening import PolicySource
from tasks.record.record import Attempt, Record
from tasks.record.slot import Slot
from tasks.record.work import Metrics, Workspace
from tasks.rows import (
    ClusterRow,
    Labelled,
    Scored,
    ScoredCandidate,
    Trajectory,
    from_table,
    to_table,
)

BEHAVIOURS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "warn": (("warn against {}", "flag {} dangers", "caution people on {}"), ("be careful now",)),
    "ask": (("ask back on {}", "request more {} detail", "check which {}"), ("which model then",)),
    "cite": (("cite {} sources", "name {} references"), ("per official guides", "per known books")),
    "joke": (("joke about {}", "use {} humour", "be funny with {}"), ("haha what a clown",)),
}
"""Behaviour → wordings that share no word but the nuisance {}, and what it inserts."""
OBJECTS = ("time", "cost", "safety", "privacy", "health")


def _world(
    prompts: int = 80, seed: int = 0
) -> tuple[list[Trajectory], list[Scored], dict[str, str]]:
    """Kept trajectories, all scored prompts, and each principle's true behaviour."""
    rng = random.Random(seed)
    kept, scored, truth = [], [], {}
    for number in range(prompts):
        candidates = []
        for sample in range(4):
            behaviour = rng.choice(list(BEHAVIOURS))
            wordings, phrases = BEHAVIOURS[behaviour]
            principle = rng.choice(wordings).format(rng.choice(OBJECTS))
            truth[principle_key(principle)] = behaviour
            noise = f" item{rng.randrange(300)}" if rng.random() < 0.5 else ""
            refined = f"repair part{number} {rng.choice(phrases)}{noise}"
            candidates.append((sample, principle, refined))
        row = _scored(f"{number:04d}", f"repair part{number}", candidates)
        scored.append(row)
        kept.append(_trajectory(row, rng.randrange(4)))
    return kept, scored, truth


def _scored(prompt_id: str, initial: str, candidates: Sequence[tuple[int, str, str]]) -> Scored:
    return Scored(
        prompt_id=prompt_id,
        prompt=({"role": "user", "content": f"please {initial}"},),
        gold="gold",
        source=f"prompts.jsonl:{prompt_id}",
        initial=initial,
        initial_finish="stop",
        initial_tokens=3,
        initial_score=0.25,
        initial_unscored=None,
        candidates=tuple(
            ScoredCandidate(
                sample=sample,
                principle=principle,
                critique="",
                refined=refined,
                finish="stop",
                tokens=9,
                score=0.5,
                unscored=None,
            )
            for sample, principle, refined in candidates
        ),
    )


def _trajectory(row: Scored, sample: int) -> Trajectory:
    candidate = row.candidates[sample]
    return Trajectory(
        prompt_id=row.prompt_id,
        prompt=row.prompt,
        gold=row.gold,
        source=row.source,
        sample=sample,
        initial=row.initial,
        principle=candidate.principle,
        refined=candidate.refined,
        initial_score=0.25,
        score=0.5,
        weight=1.0,
    )


def _kept(*principles: str, refined: str = "a b") -> tuple[list[Trajectory], list[Scored]]:
    scored = [_scored(f"{i:04d}", "a", [(0, p, refined)]) for i, p in enumerate(principles)]
    return [_trajectory(row, 0) for row in scored], scored


def _settings(**values: object) -> ClusterSettings:
    return ClusterSettings.model_validate({"picture": "none", **values})


def _ari(clustering: Clustering, truth: dict[str, str]) -> float:
    rows = clustering.clusters
    return float(
        adjusted_rand_score(
            [truth[principle_key(row.principle)] for row in rows], [row.cluster for row in rows]
        )
    )


def _together(clustering: Clustering) -> set[tuple[str, ...]]:
    """The kept principles of each cluster, in the trajectories' order."""
    return {
        tuple(row.principle for row in clustering.labelled if row.cluster == number)
        for number in range(len(clustering.constitution.principles))
    }


class FakePolicy:
    """Dislikes some principles: log p(y2) is -5 nats under them, -1 under all others."""

    def __init__(self, disliked: dict[str, float]) -> None:
        self.disliked = disliked
        self.asked: list[tuple[tuple[Message, ...], str]] = []

    def generate(self, requests: object, progress: object = None) -> list[list[Completion]]:
        raise AssertionError("clustering samples nothing")

    def logprobs(self, pairs: Sequence[tuple[tuple[Message, ...], str]]) -> list[Scoring]:
        self.asked += pairs
        texts = [" / ".join(m["content"] for m in messages) for messages, _ in pairs]
        values = [next((v for d, v in self.disliked.items() if d in t), -1.0) for t in texts]
        return [Scoring(logprob=value, tokens=3) for value in values]

    def hidden_states(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([[10.0, text.startswith("warn"), text.startswith("ask")] for text in texts])


def test_every_trajectory_is_labelled_once_and_the_counts_add_up() -> None:
    kept, scored, _ = _world()
    result = cluster(kept, scored, _settings(), experiment="e", iteration=2)
    texts = result.constitution.texts
    assert [(r.prompt_id, r.sample, r.principle) for r in result.labelled] == [
        (r.prompt_id, r.sample, r.principle) for r in kept
    ]
    assert [texts[r.cluster] for r in result.labelled] == [r.label for r in result.labelled]
    assert sum(p.support for p in result.constitution.principles) == len(kept)
    assert sum(p.share for p in result.constitution.principles) == pytest.approx(1, abs=1e-4)
    assert sum(row.support for row in result.clusters) == result.counts["trajectories"] == len(kept)
    assert len(result.clusters) == result.counts["distinct"] == len({r.principle for r in kept})
    assert result.counts["replaced"] == sum(r.label != r.principle for r in result.labelled)
    assert (result.constitution.experiment, result.constitution.iteration) == ("e", 2)


def test_principles_meet_by_effect_where_their_wordings_share_nothing() -> None:
    kept, scored, truth = _world()
    together = cluster(kept, scored, _settings())
    assert _ari(together, truth) == 1
    assert len(together.constitution.principles) == len(BEHAVIOURS)
    assert _ari(cluster(kept, scored, _settings(features=["effect"])), truth) == 1
    assert _ari(cluster(kept, scored, _settings(features=["characters"])), truth) < 0.6


def test_the_order_of_rows_does_not_matter() -> None:
    kept, scored, _ = _world()
    first = cluster(kept, scored, _settings(), seed=3)
    random.Random(1).shuffle(kept)
    random.Random(2).shuffle(scored)
    second = cluster(kept, scored, _settings(), seed=3)
    assert second.constitution == first.constitution
    assert second.clusters == first.clusters
    by_id = {row.prompt_id: row for row in first.labelled}
    assert all(row == by_id[row.prompt_id] for row in second.labelled)


@pytest.mark.parametrize("drawn", ["none", "svd", "umap"])
@pytest.mark.parametrize("principles", [(), ("be kind",), ("be kind", "warn them")])
def test_a_handful_of_principles_is_enough(principles: tuple[str, ...], drawn: str) -> None:
    kept, scored = _kept(*principles)
    result = cluster(kept, scored, _settings(picture=drawn))
    assert len(result.labelled) == len(result.clusters) == len(principles)
    assert all((row.x is None) == (drawn == "none") for row in result.clusters)


def test_spellings_of_one_principle_count_as_one() -> None:
    kept, scored = _kept("Be kind.", "be  kind", "be kind", "warn them")
    result = cluster(kept, scored, _settings(features=["characters"]))
    assert [(p.text, p.support) for p in result.constitution.principles] == [
        ("be kind", 3),
        ("warn them", 1),
    ]
    assert [row.replaced for row in result.labelled] == [True, True, False, False]


def test_a_principle_that_inserts_nothing_is_reported() -> None:
    quiet = _scored("9999", "a b", [(0, "be quiet", "a")])
    kept, scored = _kept("be kind", "be kinder")
    kept, scored = [*kept, _trajectory(quiet, 0)], [*scored, quiet]
    by_effect = cluster(kept, scored, _settings(features=["effect"], picture="svd"))
    notes = {row.principle: (row.note, row.x is None) for row in by_effect.clusters}
    assert notes == {
        "be kind": ("", False), "be kinder": ("", False), "be quiet": ("no vector", True)
    }  # fmt: skip
    assert len(by_effect.constitution.principles) == 2
    by_both = cluster(kept, scored, _settings())
    assert by_both.counts["no_insertion"] == 1
    assert [row.inserted for row in by_both.clusters if row.note == "no insertion"] == [0]


def test_agglomerate_is_average_linkage() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((300, 12)) + 2 * rng.standard_normal((9, 12))[np.arange(300) % 9]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    tree = linkage(vectors, "average", metric="cosine")
    ours = sorted(merge.distance for merge in agglomerate(vectors, block=64))
    np.testing.assert_allclose(ours, np.maximum(tree[:, 2], 0), atol=1e-5)
    features = Features(vectors.astype(np.float32), np.ones(300, dtype=bool))
    for threshold in (0.1, 0.3, 0.6, 0.9):
        theirs = fcluster(tree, threshold, "distance")
        assert adjusted_rand_score(theirs, group(features, threshold)) == 1
    for at_most in (1, 5, 40):
        theirs = fcluster(tree, at_most, "maxclust")
        assert adjusted_rand_score(theirs, group(features, 1e-6, at_most)) == 1


def test_agglomerate_ends_quickly_where_all_distances_are_equal() -> None:
    for vectors in (np.eye(600), np.ones((600, 1))):
        assert len(agglomerate(vectors)) == 599
    assert len(agglomerate(np.eye(600), threshold=0.5)) == 0


def test_a_mean_with_its_size_merges_as_the_rows_that_it_stands_for() -> None:
    rng = np.random.default_rng(1)
    vectors = _near_groups(rng, rows=200, groups=8)
    copies = rng.integers(1, 6, 200)
    rows = np.repeat(vectors, copies, axis=0)
    ours = sorted(merge.distance for merge in agglomerate(vectors, sizes=copies))
    exact = sorted(merge.distance for merge in agglomerate(rows))
    np.testing.assert_allclose(ours, exact[len(rows) - 200 :], atol=1e-5)
    np.testing.assert_allclose(exact[: len(rows) - 200], 0, atol=1e-5)
    alike = sorted(merge.distance for merge in agglomerate(vectors))
    assert not np.allclose(ours, alike, atol=1e-3)  # sizes matter


def test_two_levels_are_exact_where_micro_clusters_are_of_identical_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(2)
    vectors = _near_groups(rng, rows=300, groups=9)
    rows = rng.permutation(np.repeat(vectors, rng.integers(1, 9, 300), axis=0))
    features = Features(rows, np.ones(len(rows), dtype=bool))
    cuts = [(0.1, None), (0.3, None), (0.6, None), (1e-6, 5), (1e-6, 40)]
    exact = [group(features, *cut) for cut in cuts]
    monkeypatch.setattr(agglomeration, "EXACT_ROWS", 340)  # rows of one kind may lie in two cells
    monkeypatch.setattr(agglomeration, "CELL_ROWS", 128)
    micro = micro_clusters(rows)
    assert len(set(micro)) == 340
    assert all(np.ptp(rows[micro == m], axis=0).max() == 0 for m in range(340))
    for cut, numbers in zip(cuts, exact, strict=True):
        np.testing.assert_array_equal(group(features, *cut), numbers)


def test_two_levels_find_the_groups_that_one_level_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    rows = _near_groups(rng, rows=2000, groups=40, width=64)
    features = Features(rows, np.arange(2000) != 7)
    exact = group(features, 0.7)
    monkeypatch.setattr(agglomeration, "EXACT_ROWS", 300)
    monkeypatch.setattr(agglomeration, "CELL_ROWS", 200)
    found = group(features, 0.7)
    assert len(set(micro_clusters(rows, 0.7))) == 300
    assert adjusted_rand_score(exact, found) > 0.98
    assert (found == found[7]).sum() == 1  # a row without a vector stays alone
    assert list(dict.fromkeys(found.tolist())) == list(range(found.max() + 1))
    with threadpool_limits(2):
        np.testing.assert_array_equal(group(features, 0.7), found)


def test_micro_clusters_do_not_reach_beyond_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agglomeration, "EXACT_ROWS", 10)
    monkeypatch.setattr(agglomeration, "CELL_ROWS", 50)
    assert len(set(micro_clusters(np.eye(200, dtype=np.float32), 0.5))) == 200
    assert len(set(micro_clusters(np.eye(200, dtype=np.float32)))) == 10


def _near_groups(rng: np.random.Generator, rows: int, groups: int, width: int = 12) -> np.ndarray:
    """Unit rows (rows, width) around so many directions, rather apart."""
    centres = 2 * rng.standard_normal((groups, width))
    vectors = rng.standard_normal((rows, width)) + centres[np.arange(rows) % groups]
    unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit.astype(np.float32)


def test_the_reduction_of_large_blocks_keeps_the_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(1200) % 20
    block = rng.standard_normal((20, 600))[truth] + 0.7 * rng.standard_normal((1200, 600))
    exact = group(block_features(block), 0.8)
    monkeypatch.setattr(blocks, "EXACT_ENTRIES", 1000)
    reduced = block_features(block)
    assert reduced.vectors.shape == (1200, 256)
    assert adjusted_rand_score(exact, group(reduced, 0.8)) > 0.99
    assert adjusted_rand_score(exact, truth) > 0.99


@pytest.mark.parametrize("scale", [1.0, 0.15], ids=["far", "near"])
@pytest.mark.parametrize("features", [["effect"], ["effect", "characters"], ["sentences"]])
def test_the_predictive_threshold_finds_the_planted_groups_by_any_features(
    features: list[str], scale: float
) -> None:
    """No one threshold suits them: sentence vectors may lie near each other or far apart."""
    kept, scored, truth = _world(160)
    rng = np.random.default_rng(0)
    directions = dict(zip(BEHAVIOURS, rng.standard_normal((4, 40)), strict=True))
    shared = rng.standard_normal(40)

    def embed(texts: Sequence[str]) -> np.ndarray:
        about = [scale * directions[truth[principle_key(text)]] for text in texts]
        return shared + np.stack(about) + 0.3 * scale * rng.standard_normal((len(texts), 40))

    settings = _settings(features=features, distance_threshold="predictive")
    found = cluster(kept, scored, settings, embed=embed)
    assert len(found.constitution.principles) == len(BEHAVIOURS)
    assert _ari(found, truth) == 1
    if (features, scale) == (["sentences"], 0.15):
        fixed = cluster(kept, scored, _settings(features=features), embed=embed)
        assert (fixed.threshold, len(fixed.constitution.principles)) == (0.8, 1)


def test_a_few_principles_are_not_enough_to_find_a_threshold() -> None:
    kept, scored = _kept("be kind", "be kinder", "warn them")
    assert cluster(kept, scored, _settings(distance_threshold="predictive")).threshold == 0.8
    with pytest.raises(ValueError, match="distance_threshold"):
        _settings(distance_threshold="best")


def test_max_principles_merges_beyond_the_threshold() -> None:
    kept, scored, _ = _world()
    result = cluster(kept, scored, _settings(max_principles=2))
    assert len(result.constitution.principles) == 2
    assert {row.label for row in result.labelled} == set(result.constitution.texts)


def test_a_bounded_constitution_has_the_best_supported_clusters_and_a_tail() -> None:
    kept, scored, _ = _world()
    free = cluster(kept, scored, _settings())
    bound = cluster(kept, scored, _settings(constitution_size=2))
    size = len(bound.constitution.principles)
    assert size == 2 < len(free.constitution.principles)
    assert bound.constitution.principles == free.constitution.principles[:2]
    inside = [row for row in bound.labelled if row.cluster < size]
    outside = [row for row in bound.labelled if row.cluster >= size]
    assert {row.label for row in inside} == set(bound.constitution.texts)
    assert all(row.label == row.principle and not row.replaced for row in outside)
    tail = bound.constitution.tail
    assert tail is not None
    assert tail.support == len(outside) == bound.counts["tail"]
    assert tail.principles == len({row.principle for row in outside})
    assert bound.constitution.coverage == pytest.approx(len(inside) / len(kept), abs=1e-5)
    assert bound.constitution.coverage + tail.share == pytest.approx(1, abs=1e-5)
    assert bound.counts["kept_outside"] == 0
    # the clusters are as they were, those of the tail beyond the constitution's end
    assert _ari(bound, {row.principle: str(row.cluster) for row in free.clusters}) == 1
    assert {row.cluster for row in bound.clusters} == set(range(len(BEHAVIOURS)))


def test_a_principle_of_few_prompts_is_left_to_the_tail_or_dropped() -> None:
    """Prompts count, not trajectories: soft selection keeps several of a prompt."""
    kept, scored = _kept(*["warn of heat"] * 3, "warn of fire", *["name a source"] * 4, "rhyme")
    kept = [
        replace(row, prompt_id="one") if row.principle == "name a source" else row for row in kept
    ]
    given = {"features": ["characters"], "distance_threshold": 0.9, "min_prompts": 3}
    left = cluster(kept, scored, _settings(**given))
    assert left.constitution.texts == ("warn of heat",)
    assert left.constitution.tail and left.constitution.tail.support == 5
    assert [row.label for row in left.labelled[4:]] == ["name a source"] * 4 + ["rhyme"]
    assert "dropped" not in left.counts

    dropped = cluster(kept, scored, _settings(**given, tail="drop"))
    assert [row.label for row in dropped.labelled] == ["warn of heat"] * 4
    assert (dropped.constitution.texts, dropped.constitution.tail) == (("warn of heat",), None)
    assert dropped.constitution.coverage == pytest.approx(1, abs=1e-5)
    assert (dropped.counts["trajectories"], dropped.counts["dropped"]) == (4, 5)
    assert len(dropped.clusters) == len(left.clusters) == 4, "the table has all, to look at"

    settings = ClusterSettings().model_dump(mode="json", context=FINGERPRINT)
    assert not {"min_prompts", "tail"} & set(settings), "older records are as they were"


def test_a_principle_without_trajectories_is_carried_over(tmp_path: Path) -> None:
    kept, scored = _kept(*["warn of heat"] * 5, *["name a source"] * 3, "offer a quote")
    before = Constitution(
        principles=(
            Principle(
                text="rhyme at the end", support=7, share=0.5, example="x", members=("rhyme",)
            ),
            Principle(text="quote", members=("offer a quote",), support=1, share=0.1),
            Principle(text="count to ten", absent=1),
        )
    )
    free = cluster(
        kept, scored, _settings(features=["characters"], constitution_size=1), before=before
    )
    assert free.constitution.texts == ("warn of heat",), "off by default"
    assert "carried" not in free.counts

    held = cluster(
        kept,
        scored,
        _settings(features=["characters"], constitution_size=1, carried=1),
        before=before,
    )
    assert held.constitution.texts == ("warn of heat", "offer a quote", "rhyme at the end")
    stayed = held.constitution.principles[-1]
    assert (stayed.absent, stayed.support, stayed.share) == (1, 0, 0.0)
    assert stayed.example == "x" and "rhyme" in stayed.members, "with what was known of it"
    assert held.counts["carried"] == 1, "the other one was absent before"
    assert [row.label for row in held.labelled] == [row.principle for row in kept]
    size = len(held.constitution.principles)
    for row in held.labelled:  # a review finds a row's principle, or the tail, by its number
        texts = dict(enumerate(held.constitution.texts))
        assert row.label == texts.get(row.cluster, "name a source") and row.cluster <= size

    many = tuple(f"rhyme {n}" for n in range(30))
    long = before.model_copy(update={"principles": (Principle(text="rhyme", members=many),)})
    whole = cluster(kept, scored, _settings(features=["characters"], carried=1), before=long)
    assert whole.constitution.principles[-1].members == many, "any of them may come back"

    again = cluster(
        kept, scored, _settings(features=["characters"], carried=1), before=held.constitution
    )
    assert "rhyme at the end" not in again.constitution.texts
    file = tmp_path / "constitution.yaml"
    save(held.constitution, file)
    assert load(file) == held.constitution
    assert file.read_text("utf-8").count("absent") == 1


def test_a_bound_that_is_not_reached_leaves_no_tail() -> None:
    kept, scored, _ = _world()
    free = cluster(kept, scored, _settings())
    bound = cluster(kept, scored, _settings(constitution_size=50))
    assert (bound.constitution, bound.labelled) == (free.constitution, free.labelled)
    assert bound.constitution.tail is None
    assert bound.constitution.coverage == pytest.approx(1, abs=1e-5)


def test_a_principle_lists_its_most_frequent_wordings_and_its_own() -> None:
    often = [f"warn of {chr(97 + n)}" for n in range(15) for _ in range(15 - n)]
    kept, scored = _kept(*often, "warn")
    settings = _settings(max_principles=1, features=["characters"])
    found = cluster(kept, scored, settings)
    (principle,) = found.constitution.principles
    assert (principle.wordings, len(principle.members)) == (16, LISTED) == (len(found.clusters), 10)
    ranked = [row.principle for row in found.clusters]
    listed = sorted(principle.members, key=ranked.index)
    assert list(principle.members) == listed, "most frequent first"
    assert principle.text in listed and set(listed) - {principle.text} < set(ranked[:LISTED])
    by_mode = cluster(kept, scored, settings.model_copy(update={"representative": "mode"}))
    assert by_mode.constitution.principles[0].members == tuple(ranked[:LISTED])


def test_the_tail_is_grey_on_the_map_and_without_names(tmp_path: Path) -> None:
    kept, scored, _ = _world()
    clusters = cluster(kept, scored, _settings(picture="svd")).clusters
    figure(clusters, tmp_path / "all.png", size=4)
    figure(clusters, tmp_path / "none.png", size=0)
    from matplotlib.image import imread

    def coloured(name: str) -> float:
        red, green, blue = np.moveaxis(imread(tmp_path / name)[..., :3], -1, 0)
        return float(((abs(red - green) > 0.02) | (abs(green - blue) > 0.02)).mean())

    assert coloured("none.png") == 0 < coloured("all.png")


def test_representatives_by_centrality_by_frequency_and_none() -> None:
    texts = ["a"] + ["b"] * 2 + ["c"] * 2 + ["d"] * 4
    kept, scored = _kept(*texts)
    distinct = distinct_principles(kept)
    angles = np.radians([0, 10, 20, 80])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    features = Features(vectors, np.ones(4, dtype=bool))
    groups = np.zeros(4, dtype=int)
    assert representatives(distinct, groups, features, "medoid") == [2]
    assert representatives(distinct, groups, features, "mode") == [3]
    free = cluster(kept, scored, _settings(representative="none"))
    assert [row.label for row in free.labelled] == texts
    assert sorted(free.constitution.texts) == ["a", "b", "c", "d"]
    assert free.counts["replaced"] == 0


def test_a_replacement_that_makes_y2_improbable_is_refused() -> None:
    kept, scored = _kept("warn a", "warn b", "warn b", "warn c")
    settings = _settings(representative="mode", logprob_tolerance=1, features=["effect"])
    policy = FakePolicy({"warn b": -5.0, "warn c": -4.5})
    result = cluster(kept, scored, settings, policy=policy, templates=TERSE)
    assert [row.label for row in result.labelled] == ["warn a", "warn b", "warn b", "warn b"]
    assert [row.replaced for row in result.labelled] == [False, False, False, True]
    assert {row.cluster for row in result.labelled} == {0}
    assert result.constitution.texts == ("warn b",)
    assert result.constitution.principles[0].support == 3
    assert (result.counts["replaced"], result.counts["kept_outside"]) == (1, 1)
    contexts = [ask_refinement(TERSE, kept[0].prompt, "a", z) for z in ("warn a", "warn b")]
    assert all((context, "a b") in policy.asked for context in contexts)
    assert len(policy.asked) == 4


def test_a_log_probability_that_is_no_number_keeps_the_original() -> None:
    kept, scored = _kept("warn a", "warn b", "warn b")
    settings = _settings(representative="mode", logprob_tolerance=1, features=["effect"])
    policy = FakePolicy({"warn b": math.nan})
    result = cluster(kept, scored, settings, policy=policy, templates=TERSE)
    assert result.labelled[0].label == "warn a"


def test_what_needs_a_policy_says_so() -> None:
    kept, scored = _kept("warn a", "warn b")
    for settings in (_settings(features=["hidden"]), _settings(logprob_tolerance=1)):
        with pytest.raises(ValueError, match="needs a policy"):
            cluster(kept, scored, settings)


def test_hidden_states_and_sentences_are_features() -> None:
    kept, scored = _kept("warn a", "ask b", "warn c", "ask d")
    by_hidden = cluster(kept, scored, _settings(features=["hidden"]), policy=FakePolicy({}))
    assert _together(by_hidden) == {("warn a", "warn c"), ("ask b", "ask d")}

    def embed(texts: Sequence[str]) -> np.ndarray:
        return np.eye(2)[[int(text[-1] in "ab") for text in texts]]

    by_sentence = cluster(kept, scored, _settings(features=["sentences"]), embed=embed)
    assert _together(by_sentence) == {("warn a", "ask b"), ("warn c", "ask d")}


def test_discovery_rate_counts_labels_that_were_never_seen() -> None:
    kept, scored = _kept("warn a", "ask b", "ask b", "joke c")
    labelled: list[Labelled] = cluster(kept, scored, _settings(representative="none")).labelled
    earlier = Constitution(principles=(Principle(text="Ask b."), Principle(text="greet")))
    assert discovery_rate(labelled, []) == 1
    assert discovery_rate(labelled, [earlier]) == 0.5
    assert discovery_rate([], [earlier]) == 0
    merged = Constitution(principles=(Principle(text="beware", members=("beware", "Warn a")),))
    assert discovery_rate(labelled, [merged]) == 0.75


def test_a_wording_that_no_file_lists_is_no_discovery(workplace: Path) -> None:
    record = Record("an-experiment", workplace / ".staple")
    policy = PolicySource(PolicySettings(), model="", base_digest="")

    def clustered(t: int, texts: Sequence[str], earlier: Mapping[str, Attempt]) -> Attempt:
        kept, scored = _kept(*texts)
        at = Slot(record, t, seed=0)

        def wrote(name: str, rows: Sequence[object], row_type: type) -> Attempt:
            def compute(work: Workspace) -> Metrics:
                work.write(name, rows, row_type)
                return {}

            return at.attempt(name, Settings(), {}, compute)

        inputs = wrote("trajectories", kept, Trajectory), wrote("mined", scored, Scored)
        return cluster_stage(at, _settings(max_principles=1, picture="none"), policy, *inputs, earlier)  # fmt: skip

    first = clustered(1, [f"warn of {letter}" for letter in "abcdefghijklmnopqrst"], {})
    (principle,) = load(first.path("constitution.yaml")).principles
    every = set(with_wordings(first).principles[0].members)
    assert (len(principle.members), len(every), principle.wordings) == (LISTED, 20, 20)
    unlisted = min(every - set(principle.members))
    later = clustered(2, [unlisted, unlisted], {"earlier": first})
    assert later.metrics["discovery_rate"] == 0


def test_the_map_has_a_place_for_every_row_that_has_a_vector(tmp_path: Path) -> None:
    kept, scored, _ = _world()
    result = cluster(kept, scored, _settings(picture="svd"))
    assert len({(row.x, row.y) for row in result.clusters}) > len(BEHAVIOURS)
    figure(result.clusters, tmp_path / "map.png", size=4)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    figure([], tmp_path / "empty.png", size=0)
    absent = Features(np.eye(3, dtype=np.float32), np.array([True, False, True]))
    assert np.isnan(map_principles(absent, "svd")).any(axis=1).tolist() == [False, True, False]


def test_the_map_shows_a_sample_of_many_principles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(picture, "PLACED", 30)
    kept, scored, _ = _world()
    result = cluster(kept, scored, _settings(picture="svd"))
    placed = [row for row in result.clusters if row.x is not None]
    assert len(placed) == 30 < len(result.clusters)
    figure(result.clusters, tmp_path / "map.png", size=4)
    again = cluster(kept, scored, _settings(picture="svd"))
    assert again.clusters == result.clusters


def test_umap_keeps_neighbours_by_cosine() -> None:
    rows = _near_groups(np.random.default_rng(4), rows=300, groups=6)
    lengths = np.random.default_rng(5).uniform(0.5, 1, (300, 1)).astype(np.float32)
    places = map_principles(Features(rows * lengths, np.ones(300, dtype=bool)), "umap")
    assert trustworthiness(rows, places, metric="cosine") > 0.9


def test_cluster_rows_travel_as_a_table() -> None:
    kept, scored, _ = _world(20)
    rows = cluster(kept, scored, _settings(picture="svd")).clusters
    assert from_table(to_table(rows, ClusterRow), ClusterRow) == rows


def test_support_counts_kept_trajectories() -> None:
    kept, _, _ = _world()
    counted = Counter(principle_key(row.principle) for row in kept)
    assert {d.key: d.support for d in distinct_principles(kept)} == counted


def test_insertions_are_counted_the_same_however_they_are_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside a plain count; in one process and in two, with pieces added up early."""
    kept, mined, _ = _world(160)
    distinct = distinct_principles(kept)
    plain: dict[str, Counter[str]] = {d.key: Counter() for d in distinct}
    for row in mined:
        for c in row.candidates:
            if (key := principle_key(c.principle)) in plain:
                plain[key] += Counter(tokens(c.refined)) - Counter(tokens(row.initial))
    words = sorted(set().union(*plain.values()))
    expected = [[plain[d.key][word] for word in words] for d in distinct]
    for shard, pending in ((64, 10**6), (2, 100)):  # 80 shards are enough for two processes
        monkeypatch.setattr(counting, "SHARD", shard)
        monkeypatch.setattr(counting, "PENDING", pending)
        found = insertions(distinct, mined)
        assert list(found.words) == words
        np.testing.assert_array_equal(found.counts.toarray(), expected)
        np.testing.assert_array_equal(found.totals, np.sum(expected, axis=1))
